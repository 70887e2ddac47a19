"""Foreign text in Markdown: whatever it holds, it shows as itself."""

from __future__ import annotations

import pytest

from trainer.report.html import markdown_code, markdown_fenced, markdown_text

markdown_it = pytest.importorskip("markdown_it")

NAMES = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "`code`",
    "``",
    "`",
    "a``b`",
    "a|b",
    "[link](javascript:alert(1))",
    "![image](http://host/x.png)",
    "*bold* _under_ ~~gone~~",
    "&lt;b&gt; &amp;",
    "back\\slash",
    "--> <b>",
    "é 漢字",
)


def shown(markdown: str) -> tuple[str, set[str]]:
    """The text that a reader sees, and the tags it is made of."""
    tokens = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown)
    every = [child for token in tokens for child in (token, *(token.children or []))]
    assert not {token.type for token in every} & {"html_block", "html_inline", "image"}
    text = "".join(token.content for token in every if token.type in ("text", "code_inline", "fence"))
    return text, {token.tag for token in every if token.tag}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_text_code_and_tables(name: str) -> None:
    assert shown(f"before {markdown_text(name)} after") == (f"before {name} after", {"p"})
    assert shown(f"before {markdown_code(name)} after") == (f"before {name} after", {"p", "code"})
    for cell in (markdown_text(name), markdown_code(name, in_table=True)):
        text, tags = shown(f"| head | second |\n|---|---|\n| {cell} | x |\n")
        assert text == f"headsecond{name}x"
        assert tags <= {"table", "thead", "tbody", "tr", "th", "td", "code"}


def test_settings_cannot_leave_their_block() -> None:
    settings = "run:\n````\n<b>\n```\n"
    assert shown(markdown_fenced(settings, "yaml")) == (settings, {"code"})


def test_control_characters_are_escaped() -> None:
    assert markdown_code("a\nb\x1b") == "`a\\nb\\x1b`"
    assert markdown_text("a\nb") == "a\\\\nb"
