package phd

import (
	"go/ast"
	"go/doc"
	"go/parser"
	"go/token"
	"path/filepath"
	"strings"
	"testing"
)

// Every exported name has a comment, which for functions and types begins with the name.
func TestDocumented(t *testing.T) {
	files := token.NewFileSet()
	names, err := filepath.Glob("*.go")
	must(t, err)
	var sources []*ast.File
	for _, name := range names {
		if !strings.HasSuffix(name, "_test.go") {
			sources = append(sources, value[*ast.File](t)(parser.ParseFile(files, name, nil, parser.ParseComments)))
		}
	}
	p, err := doc.NewFromFiles(files, sources, "github.com/libphd/libphd/bindings/go")
	must(t, err)
	check := func(name, comment string) {
		words := strings.Fields(comment)
		if len(words) > 1 && (words[0] == "A" || words[0] == "An") {
			words = words[1:]
		}
		if len(words) < 3 || words[0] != name {
			t.Errorf("the comment of %s begins %.40q", name, comment)
		}
	}
	values := func(groups []*doc.Value) {
		for _, group := range groups {
			if group.Doc == "" && ast.IsExported(group.Names[0]) {
				t.Errorf("%v has no comment", group.Names)
			}
		}
	}
	functions := func(list []*doc.Func) {
		for _, f := range list {
			check(f.Name, f.Doc)
		}
	}
	if len(p.Doc) < 100 || len(p.Types) < 20 {
		t.Errorf("the package has %d types and a comment of %d bytes", len(p.Types), len(p.Doc))
	}
	values(p.Consts)
	values(p.Vars)
	functions(p.Funcs)
	for _, typ := range p.Types {
		check(typ.Name, typ.Doc)
		values(typ.Consts)
		values(typ.Vars)
		functions(typ.Funcs)
		functions(typ.Methods)
	}
}
