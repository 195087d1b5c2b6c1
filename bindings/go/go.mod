module github.com/libphd/libphd/bindings/go

go 1.24
