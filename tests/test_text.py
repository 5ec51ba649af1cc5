"""Names of others in what spreadsheets, Markdown and terminals read."""

import csv
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import embtab as et
from embtab.bench.report import Result, write_csv
from embtab.cli import main
from embtab.compare.rows import read_rows, write_rows
from embtab.text import cell, csv_text, fenced, from_cell, markdown, printable

HARD = [
    *(
        '=HYPERLINK("http://x","y")',
        "+1+cmd|' /C calc'!A0",
        "-2+3",
        "@SUM(1)",
        "\t=1",
        "\r=1",
        "\n=1",
        "'=1",
        "'",
        "''x",
    ),
    *(
        "=",
        "-",
        "--1",
        "+",
        "1",
        "-1",
        "+1.5e-7",
        "-.5",
        "1_000",
        "x=1",
        "",
        "é",
        "a,b",
        'a"b',
        "-inf",
        "1-2",
        "\x1b]0;x\x07",
    ),
]
NASTY = [
    *("<script>alert(1)</script>", "a|b", "*bold*", "_em_", "`code`", "[x](http://evil)", "![x](http://evil/i.png)"),
    *(
        "# head",
        "- item",
        "1. item",
        "a_b_c",
        "&lt;",
        "http://evil",
        "www.evil.org",
        "x\n\n# head",
        "~~x~~",
        "\\",
        "```",
    ),
    *("\x1b[31mred", "\u202egnp", "\x9b31m", "</details>", "-----", "=====", "> quote", "$x$", "a\\|b", "<!-- "),
]


@pytest.mark.parametrize("value", HARD)
def test_no_cell_is_a_formula_and_each_is_read_back(value: str, tmp_path: Path) -> None:
    for file in (tmp_path / "a.csv", tmp_path / "b.csv"):
        write_rows(file, ["name", "number", value or "x"], [{"name": value, "number": -1.5, value or "x": None}])
    with (tmp_path / "a.csv").open(newline="") as opened:
        for found in (each for row in csv.reader(opened) for each in row):
            number = found.replace("e-", "").lstrip("+-").replace(".", "", 1).isdigit()
            assert number or not found.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    assert from_cell(cell(value)) == value
    (row,) = read_rows(tmp_path / "a.csv", ["name", "number", cell(value or "x")], ["name"], str).values()
    assert (row["name"] or "", row["number"]) == (value, -1.5)


def test_other_files_of_numbers_are_written_so(tmp_path: Path) -> None:
    result = Result("lookups", "step", "=1+1", 8, 1, 1, "@x", 1, 0.1, 0.1, -1.0, 1.0)
    write_csv([result, replace(result, arm="hash")], tmp_path / "results.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert [(row["arm"], row["skew"], row["ratio"]) for row in rows] == [
        ("'=1+1", "'@x", "-1.0"),
        ("hash", "'@x", "-1.0"),
    ]
    assert csv_text(["=a"], [{"=a": "+b"}, {}]) == "'=a\r\n'+b\r\n\r\n".replace("\r\n\r\n", '\r\n""\r\n')


@pytest.mark.parametrize("value", NASTY)
def test_markdown_shows_names_as_they_are(value: str) -> None:
    """By another's parser: the page has one table of one cell, whose text is the name."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True})
    parser.enable(["table", "strikethrough"])
    tokens = parser.parse(f"| {markdown(value)} |\n|---|\n\n{markdown(value)}\n\n- {markdown(value)}\n")
    inline = [token for token in tokens if token.type == "inline"]
    assert len(inline) == 3
    assert {token.type for token in tokens} <= {
        *("table_open", "thead_open", "tr_open", "th_open", "inline", "th_close", "tr_close", "thead_close"),
        *("table_close", "paragraph_open", "paragraph_close", "bullet_list_open", "list_item_open", "list_item_close"),
        "bullet_list_close",
    }
    for token in inline:
        assert all(child.type in ("text", "text_special") for child in token.children or [])
        assert "".join(child.content for child in token.children or []) == printable(value).strip()


def test_a_fence_holds_what_it_holds() -> None:
    text = "a\n```\n# head\n````"
    lines = "\n".join(fenced(text)).split("\n")
    assert lines[0] == "`````text"
    assert lines.index("`````") == len(lines) - 1


def test_names_neither_command_terminals_nor_end_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "evil\x1b[2J\x9b2J\u202e\n```\n<script>"
    tables = et.EmbeddingBagCollection(et.plan([et.Feature(name, 50)], "hash", "0.5x", dim=4), backend="torch")
    et.save(tables, tmp_path / "b", provenance={"<b>": "</b>*x*"})
    card = (tmp_path / "b" / "README.md").read_text()
    parsed = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).parse(card)
    assert not {"html_block", "html_inline", "em"} & {
        each.type for token in parsed for each in (token, *(token.children or []))
    }
    assert len([token for token in parsed if token.type == "fence"]) == 2
    assert '- &lt;b&gt;: "&lt;/b&gt;\\*x\\*"' in card
    for command in ("verify", "inspect"):
        main([command, str(tmp_path / "b")])
    with pytest.raises(SystemExit):
        main(["verify", str(tmp_path / "b\x1b[2J")])
    said = capsys.readouterr()
    for text in (card, said.out, said.err):
        assert "evil\\x1b[2J" in text or "b\\x1b[2J" in text
        assert not {"\x1b", "\x9b", "\u202e"} & set(text)


def test_an_error_about_half_a_character_can_be_printed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "embtab", "inspect", b"\xff\x1b"], capture_output=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"embtab: error: \\udcff\\x1b: not a bundle")
