package toolcall

import (
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// A Parser reads a model's output as it comes and makes a message of it: the thinking, the answer, the calls. How the output
// is cut into pieces makes no difference to the message. Text is never lost: what begins like a call and is none is part of the
// answer; only white space around thinking and calls, and what only marks them, is left out.
type Parser struct {
	syntax *syntax // nil: there are no calls
	tools  map[string]bool
	think  Tags
	single bool // what follows the first call is not looked at
	// A response of the generic syntax is a JSON value instead of a string.
	rawResponse bool
	newID       func() string

	state    state
	buf      string // not yet understood
	scan     scanner
	tail     int    // elements of the tail, or of the end, that have been read
	white    string // at the end of the answer, or of the thinking: left out if a call follows, or the end of the thinking
	trim     bool   // white space at the beginning is left out
	tried    bool   // it is clear that the answer is no anchored call
	deltas   []Delta
	thoughts strings.Builder
	content  strings.Builder
	calls    []*call
}

type call struct {
	id, name  string
	arguments strings.Builder
}

type state int

const (
	atStart state = iota
	inThinking
	inContent
	inArguments
	inTail
	afterCall
	inLast
	inResponse
	afterResponse
	atEnd
)

// Push passes more of the output, and returns what it has added to the message.
func (p *Parser) Push(text string) []Delta {
	p.buf += text
	return p.run(false)
}

// Finish says that there is no more, and returns what was held back.
func (p *Parser) Finish() []Delta { return p.run(true) }

// Message is the message so far.
func (p *Parser) Message() Message {
	m := Message{Role: "assistant", Reasoning: p.thoughts.String(), Content: p.content.String()}
	for _, c := range p.calls {
		m.Calls = append(m.Calls, Call{ID: c.id, Name: c.name, Arguments: c.arguments.String()})
	}
	return m
}

func (p *Parser) run(final bool) []Delta {
	for p.step(final) {
	}
	if final {
		switch p.state {
		case inThinking:
			p.addThoughts(p.buf)
		case atEnd, inTail, afterCall, inLast, afterResponse: // the rest of a call's marks
		default:
			p.addContent(p.buf)
		}
		p.buf = ""
		if len(p.calls) == 0 && p.white != "" && p.state != inThinking {
			p.put(p.white)
		}
		p.white = ""
		p.state = atEnd
	}
	deltas := p.deltas
	p.deltas = nil
	return deltas
}

// step understands the next piece of the buffer, if it can be understood, and says whether it could.
func (p *Parser) step(final bool) bool {
	switch p.state {
	case atStart:
		return p.start(final)
	case inThinking:
		return p.thinking()
	case inContent:
		return p.answer(final)
	case inArguments:
		n, done := p.scan.next(p.buf)
		p.addArguments(p.take(n))
		if done {
			p.state, p.tail = inTail, 0
		}
		return done
	case inTail:
		if !p.through(p.syntax.tail, final) {
			return false
		}
		p.state = afterCall
		if p.single {
			p.state = atEnd
		}
		return true
	case afterCall:
		return p.next(final)
	case inLast:
		if !p.through(p.syntax.last, final) {
			return false
		}
		p.state, p.trim = inContent, true
		return true
	case inResponse:
		return p.response()
	case afterResponse:
		if !p.through(genericEnd, final) {
			return false
		}
		p.state, p.trim = inContent, true
		return true
	}
	p.buf = "" // atEnd
	return false
}

var genericEnd = pattern{sp(""), lit("}")}

// take removes n bytes from the buffer.
func (p *Parser) take(n int) string {
	text := p.buf[:n]
	p.buf = p.buf[n:]
	return text
}

// start looks whether the output begins with thinking.
func (p *Parser) start(final bool) bool {
	if p.think.Open != "" {
		text := strings.TrimLeft(p.buf, white)
		switch v := matchLiteral(text, p.think.Open); {
		case v == yes:
			p.take(len(p.buf) - len(text) + len(p.think.Open))
			p.state, p.trim = inThinking, true
			return true
		case v == more && !final:
			return false
		}
	}
	p.state = inContent
	return true
}

func (p *Parser) thinking() bool {
	if n := strings.Index(p.buf, p.think.Close); n >= 0 {
		p.addThoughts(p.take(n))
		p.take(len(p.think.Close))
		p.white = ""
		p.state, p.trim = inContent, true
		return true
	}
	p.addThoughts(p.take(len(p.buf) - overlap(p.buf, p.think.Close)))
	return false
}

// overlap is the length of the longest end of text that is a beginning of word.
func overlap(text, word string) int {
	n := min(len(text), len(word)-1)
	for !strings.HasPrefix(word, text[len(text)-n:]) {
		n--
	}
	return n
}

// answer reads text up to the next call.
func (p *Parser) answer(final bool) bool {
	if p.syntax == nil || p.syntax.anchored && p.tried {
		p.addContent(p.take(len(p.buf)))
		return false
	}
	lead := join(p.syntax.first, p.syntax.head)
	if p.syntax.anchored {
		v, n, tool := lead.match(p.buf, p.tools)
		response, length := no, 0
		if p.syntax.response != nil {
			response, length, _ = p.syntax.response.match(p.buf, nil)
		}
		if v != yes && (v == more || response == more) && !final {
			return false
		}
		p.tried = true
		switch {
		case v == yes:
			p.beginCall(n, tool)
		case response == yes:
			p.take(length)
			p.beginResponse()
		}
		return true
	}
	begin := lead[0].text[0]
	for i := 0; ; i++ {
		n := strings.IndexByte(p.buf[i:], begin)
		if n < 0 {
			p.addContent(p.take(len(p.buf)))
			return false
		}
		i += n
		switch v, n, tool := lead.match(p.buf[i:], p.tools); {
		case v == yes:
			p.addContent(p.take(i))
			p.beginCall(n, tool)
			return true
		case v == more && !final:
			p.addContent(p.take(i))
			return false
		}
	}
}

// beginCall begins a call whose head has n bytes, the last of which is the first of its arguments.
func (p *Parser) beginCall(n int, tool string) {
	p.take(n - 1)
	p.white = ""
	c := &call{id: p.newID(), name: tool}
	p.deltas = append(p.deltas, Delta{Call: &CallDelta{Index: len(p.calls), ID: c.id, Name: tool}})
	p.calls = append(p.calls, c)
	p.scan = scanner{}
	p.state = inArguments
}

// beginResponse begins an answer in the generic syntax.
func (p *Parser) beginResponse() {
	p.scan = scanner{}
	p.state = inResponse
	if p.buf[0] == '"' && !p.rawResponse {
		p.take(1)
	} else {
		p.rawResponse = true
	}
}

// through reads as many of the elements that end something as there are.
func (p *Parser) through(end pattern, final bool) bool {
	for ; p.tail < len(end); p.tail++ {
		switch v, n := end[p.tail].match(p.buf, 0, nil); {
		case v == yes:
			p.take(n)
		case v == more && !final:
			return false
		case v == more:
			p.take(len(p.buf))
			p.tail = len(end)
			return true
		default:
			return true
		}
	}
	return true
}

// next looks what follows a call: another one, or the end of all.
func (p *Parser) next(final bool) bool {
	if p.syntax.sep != nil {
		switch v, n, tool := join(p.syntax.sep, p.syntax.head).match(p.buf, p.tools); {
		case v == yes:
			p.beginCall(n, tool)
			return true
		case v == more && !final:
			return false
		}
	}
	p.state, p.tail = inLast, 0
	return true
}

// response reads the answer in the generic syntax: a JSON string, or any JSON value.
func (p *Parser) response() bool {
	if p.rawResponse {
		n, done := p.scan.next(p.buf)
		p.addContent(p.take(n))
		if done {
			p.state, p.tail = afterResponse, 0
		}
		return done
	}
	for p.buf != "" {
		n := strings.IndexAny(p.buf, `"\`)
		if n < 0 {
			p.addContent(p.take(len(p.buf)))
			return false
		}
		p.addContent(p.take(n))
		if p.buf[0] == '"' {
			p.take(1)
			p.state, p.tail = afterResponse, 0
			return true
		}
		text, n := unescape(p.buf)
		if n == 0 {
			return false
		}
		p.take(n)
		p.addContent(text)
	}
	return false
}

// unescape reads the escape that text begins with, and its length; 0: there is more of it to come.
func unescape(text string) (string, int) {
	if len(text) < 2 {
		return "", 0
	}
	const names, values = `"\/bfnrt`, "\"\\/\b\f\n\r\t"
	if n := strings.IndexByte(names, text[1]); n >= 0 {
		return values[n : n+1], 2
	}
	if text[1] != 'u' {
		return text[:1], 1 // not JSON: as it is
	}
	unit, n, ok := unit16(text)
	if n == 0 || !ok {
		return text[:n], n
	}
	if !utf16.IsSurrogate(unit) {
		return string(unit), n
	}
	// The second half of a pair must follow.
	if rest := text[n:]; len(rest) < 2 && strings.HasPrefix(`\u`, rest) {
		return "", 0
	} else if strings.HasPrefix(rest, `\u`) {
		second, m, ok := unit16(rest)
		if m == 0 {
			return "", 0
		}
		if r := utf16.DecodeRune(unit, second); ok && r != utf8.RuneError {
			return string(r), n + m
		}
	}
	return string(utf8.RuneError), n
}

// unit16 reads \uXXXX: its length, 0 if there is more to come; not ok: it is something else.
func unit16(text string) (unit rune, n int, ok bool) {
	for n = 2; n < 6; n++ {
		if n == len(text) {
			return 0, 0, false
		}
		b := text[n] | 0x20
		switch {
		case '0' <= text[n] && text[n] <= '9':
			unit = unit<<4 | rune(b-'0')
		case 'a' <= b && b <= 'f':
			unit = unit<<4 | rune(b-'a'+10)
		default:
			return 0, n, false
		}
	}
	return unit, n, true
}

// addContent adds to the answer. White space waits until something follows, if a call might.
func (p *Parser) addContent(text string) {
	if p.trim {
		text = strings.TrimLeft(text, white)
	}
	if text == "" {
		return
	}
	p.trim = false
	if p.syntax == nil || p.syntax.anchored {
		p.put(text)
		return
	}
	solid := strings.TrimRight(text, white)
	if solid == "" {
		p.white += text
		return
	}
	p.put(p.white + solid)
	p.white = text[len(solid):]
}

func (p *Parser) put(text string) {
	p.content.WriteString(text)
	p.deltas = append(p.deltas, Delta{Content: text})
}

func (p *Parser) addThoughts(text string) {
	if p.trim {
		text = strings.TrimLeft(text, white)
	}
	if text == "" {
		return
	}
	p.trim = false
	solid := strings.TrimRight(text, white)
	if solid == "" {
		p.white += text
		return
	}
	solid, p.white = p.white+solid, text[len(solid):]
	p.thoughts.WriteString(solid)
	p.deltas = append(p.deltas, Delta{Reasoning: solid})
}

func (p *Parser) addArguments(text string) {
	if text == "" {
		return
	}
	i := len(p.calls) - 1
	p.calls[i].arguments.WriteString(text)
	p.deltas = append(p.deltas, Delta{Call: &CallDelta{Index: i, Arguments: text}})
}

// A scanner finds the end of a JSON value. It looks at brackets and strings alone.
type scanner struct {
	depth            int
	inString, escape bool
	begun            bool
}

// next returns how many bytes of text belong to the value, and whether it ends with them.
func (s *scanner) next(text string) (n int, done bool) {
	for i := 0; i < len(text); i++ {
		b := text[i]
		switch {
		case s.escape:
			s.escape = false
		case s.inString:
			s.escape = b == '\\'
			if b == '"' {
				s.inString = false
				if s.depth == 0 {
					return i + 1, true
				}
			}
		case b == '"':
			s.inString = true
		case b == '{' || b == '[':
			s.depth++
		case s.depth > 0 && (b == '}' || b == ']'):
			if s.depth--; s.depth == 0 {
				return i + 1, true
			}
		case s.depth == 0 && (b == '}' || b == ']' || b == ',' || s.begun && strings.IndexByte(white, b) >= 0):
			return i, true // the end of a number, or of a word
		}
		s.begun = true
	}
	return len(text), false
}
