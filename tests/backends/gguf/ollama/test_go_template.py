"""The part of Go's template language that is known here. What is expected was printed by Go's text/template."""

from __future__ import annotations

from typing import Any

import pytest

from exporter.backends.gguf.ollama.go_template import quoted, render

VALUES: dict[str, Any] = {
    "Name": "x",
    "Empty": "",
    "Yes": True,
    "Rows": [{"Role": "a", "Inner": {"Text": "1"}}, {"Role": "b", "Inner": {"Text": "2"}}],
    "None": [],
}

# Source and output; each was run through Go 1.27 with the same values.
GO = [
    ("plain\n text", "plain\n text"),
    ("a \n{{- .Name }} b", "ax b"),
    ("a {{ .Name -}} \n b", "a xb"),
    ("a \n {{- .Name -}} \n b", "axb"),
    ("{{if .Yes}}1{{else}}2{{end}}{{ if .Empty }}3{{ else }}4{{ end }}", "14"),
    ("{{ if .Empty }}1{{ else if .None }}2{{ else if .Yes }}3{{ else }}4{{ end }}", "3"),
    ("{{ range .Rows }}{{ .Role }}{{ .Inner.Text }};{{ end }}", "a1;b2;"),
    ("{{ range $i, $row := .Rows }}{{ $i }}{{ $row.Inner.Text }}{{ $.Name }}{{ .Role }} {{ end }}", "01xa 12xb "),
    ("{{ range $row := .Rows }}{{ $row.Role }}{{ end }}", "ab"),
    ("{{ $x := 1 }}{{ range .Rows }}{{ $x = .Role }}{{ end }}{{ $x }}", "b"),
    ("{{ $x := 1 }}{{ range .Rows }}{{ $x := .Role }}{{ $x }}{{ end }}{{ $x }}", "ab1"),
    ("{{ $x := 1 }}{{ if .Yes }}{{ $x := 2 }}{{ $x }}{{ end }}{{ $x }}", "21"),
    ('{{ if and .Yes (eq .Name "x") }}1{{ end }}{{ if or .Empty (ne .Name "x") }}2{{ end }}', "1"),
    ("{{ and .Name .Empty }}|{{ or .Empty .Name }}|{{ not .Empty }}", "|x|true"),
    ("{{ range $i, $_ := .Rows }}{{ eq (len (slice $.Rows $i)) 1 }} {{ gt $i 0 }};{{ end }}", "false false;true true;"),
    ('{{ "a\\n{{ \\"b\\" }}\\U0000200b\\\\" }}', 'a\n{{ "b" }}\u200b\\'),
    ("{{ $n := -1 }}{{ $n }}{{ if $n }}t{{ end }}{{ if 0 }}f{{ end }}", "-1t"),
    ("{{ range .None }}1{{ end }}{{ len .None }}", "0"),
]


@pytest.mark.parametrize(("source", "expected"), GO)
def test_like_go(source: str, expected: str) -> None:
    assert render(source, VALUES) == expected


@pytest.mark.parametrize(
    "source",
    ["{{ end }}", "{{ if .Yes }}", "{{ else }}", "{{ $x }}", "{{ $x = 1 }}", "{{ .Name | len }}", "{{ printf 1 }}"],
)
def test_what_is_not_known_is_refused(source: str) -> None:
    with pytest.raises(ValueError):
        render(source, VALUES)


@pytest.mark.parametrize(
    "text", ["", 'say "x"', "a\n\tb\\n", '"""', "{{ }}", "caf\u00e9 \u5317\U0001f600", "\u200b\u00a0"]
)
def test_literals_come_back_and_survive_a_modelfile(text: str) -> None:
    literal = quoted(text)
    assert render(f"{{{{ {literal} }}}}", {}) == text
    assert literal.isprintable()
    assert '"""' not in literal
