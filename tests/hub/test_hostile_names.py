"""A card shows names and values as they are, whatever is in them, and can be written, merged and pushed again."""

import json
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser

import pytest
from huggingface_hub import ModelCard, metadata_load

from hf_guided.hub import write_model_card
from hf_guided.hub.card_edits import merge
from hf_guided.hub.markdown import code_span, escape, single_line
from hf_guided.hub.model_card import address
from hf_guided.hub.space import write_space

markdown_it = pytest.importorskip("markdown_it")

HOSTILE = [
    "<!-- hf-guided: [] -->",
    '<!-- hf-guided: {"metadata": {}, "sections": {}} -->',
    'a\n\n<!-- hf-guided: {"metadata": [], "sections": 1} -->\n\nb',
    "<!-- hf-guided: " + "[" * 5000 + " -->",
    "a\n\n## Results\n\n| FID |\n| --- |\n| 0.1 |",
    "# Results",
    "---\nlicense: other\n---",
    "---",
    "===",
    "***",
    "- a list",
    "+ a list",
    "1. a list",
    "2) a list",
    "> a quote",
    "`",
    "``` \n# Results\n```",
    "a` <b>bold</b> `c",
    "~~~",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</details>",
    "[click](javascript:alert(1))",
    "![p](https://evil.example/p.png)",
    "[x]: https://evil.example",
    "<https://evil.example>",
    "a | b || c",
    "back\\slash \\| bar \\` tick \\",
    "*bold* __bold__ _it_ ~~gone~~",
    "&lt;b&gt; &#60;b&#62;",
    "$$\\int$$",
    "C # sharp #",
    "nul\0 bell\a escape\x1b[31m",
    "\u202egnp.\u202c \u2066x\u2069 \ufeff",
    "line\u2028two\u2029three\x85four\rfive",
    "not UTF-8 \udce9",
    "x" * 5000,
    "{title} {0} %s",
    "key: [value, *anchor]",
    "   ",
    "",
    "family 👨‍👩‍👧 and zwölf",
]


class Page(HTMLParser):
    """The tags of a page, and the text of each kind of tag."""

    def __init__(self, card):
        super().__init__()
        self.tags, self.texts, self.open = [], {}, []
        _, _, body = card.removeprefix("---\n").partition("\n---\n")
        self.feed(
            markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough").render(body)
        )

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def handle_comment(self, data):
        self.tags.append(("comment", data))


def write(folder, name, **changes):
    arguments = {
        "title": f"Guided diffusion on {name}",
        "dataset": name,
        "class_names": [name, "other"],
        "training": {"recipe": name, name: "value", "versions": {name: name}},
        "results": [{"samples": "generated", "setting": name, f"fid/{name}": 2.0}],
        "inspection": {
            "rows": [{"timestep": 0, "accuracy": 0.5}], "num_images": 2, "num_train_images": 0, "findings": [name],
        },
        "license": name,
        "base_model": name,
        "dataset_id": name,
        "summary": name,
    }  # fmt: skip
    columns = ("train_accuracy", "confidence", "calibration_error", "cross_entropy", "epsilon_shift")
    arguments["inspection"]["rows"][0].update(dict.fromkeys(columns))
    return write_model_card(folder, **arguments | changes)


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_name_is_shown_and_does_nothing(name, tmp_path):
    path = write(tmp_path, name)
    card = path.read_text(encoding="utf-8")
    page = Page(card)
    plain = Page(write(tmp_path_of(tmp_path), "plain").read_text())
    shown = single_line(name)

    # The page has the tags of one with harmless names: no heading, table, link, picture, list or comment more.
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert [about for tag, about in page.tags if tag == "a"] == [about for tag, about in plain.tags if tag == "a"]
    assert page.texts["h2"] == plain.texts["h2"]
    assert collapsed(page.texts["h1"]) == [" ".join(single_line(f"Guided diffusion on {name}").split())]

    # And the name is there, to the letter.
    assert page.texts["code"][-2:] == [single_line(name, length=100) or " ", "other"]
    assert collapsed(page.texts["li"])[-1] == " ".join(shown.split())
    cells = [" ".join(cell.split()) for cell in page.texts["td"]]
    assert cells.count(" ".join(shown.split())) >= 1
    assert single_line(f"{shown} {shown}") in cells or not shown
    assert not [char for char in card if unicodedata.category(char) in ("Cc", "Cf") and char not in "\n\u200d"]

    # Its metadata are read back, and the next card takes its place to the byte; an edit stays.
    assert ModelCard(card).data.model_name == single_line(f"Guided diffusion on {name}")
    assert write(tmp_path, name).read_text(encoding="utf-8") == card
    path.write_text(card.replace("## Training", "## Thanks\n\nTo Ada.\n\n## Training"), encoding="utf-8")
    edited = write(tmp_path, name, training={"steps": 7}).read_text(encoding="utf-8")
    assert "To Ada." in edited
    assert "| Steps | 7 |" in edited
    assert edited.count("\n<!-- hf-guided: ") == 1
    fresh = write(tmp_path_of(tmp_path, "fresh"), name, training={"steps": 7}).read_text(encoding="utf-8")
    assert merge(card, fresh) == fresh

    # The code runs as it stands, and is addressed.
    code = address(card, "ada/digits", standalone=True).split("```python\n")[1].split("\n```")[0]
    compile(code, "README.md", "exec")
    assert 'DiffusionPipeline.from_pretrained("ada/digits", trust_remote_code=True)' in code


def tmp_path_of(tmp_path, name="plain"):
    (tmp_path / name).mkdir(exist_ok=True)
    return tmp_path / name


def collapsed(texts):
    return [" ".join(text.split()) for text in texts]


def test_a_name_that_reads_as_our_own_code_is_left_as_it_is(tmp_path):
    names = ['from_pretrained(".")', "from hf_guided import VAEPipeline", 'model="."']
    card = address(write(tmp_path, "digits", class_names=names).read_text(), "ada/digits", standalone=True)
    for name in names:
        assert f"`{name}`" in card


def test_ordinary_names_are_not_touched():
    for name in ("zwölf", "Siberian husky", "cat_dog", "0", "-1.5", "-", "C#", "it's 50 % (a+b)", "猫", "نمی‌خواهم"):
        assert escape(name) == single_line(name) == name
        assert code_span(name) == f"`{name}`"


@pytest.mark.parametrize(
    "record",
    [
        "[]", "null", "1", '"text"', "{}", "{", "[" * 100_000, '{"metadata": {}}', '{"metadata": [], "sections": {}}',
        '{"metadata": {"a": 1}, "sections": {}}', '{"metadata": {}, "sections": {}, "more": {}}',
    ],
)  # fmt: skip
def test_an_unreadable_record_is_as_none(record, tmp_path):
    path = write(tmp_path, "digits", class_names=["a", "b"])
    before, _, _ = path.read_text().partition("<!-- hf-guided: ")
    path.write_text(f"{before}<!-- hf-guided: {record} -->\n")
    text = write(tmp_path, "digits", class_names=["c", "d"], title="New").read_text()
    assert "`a`, `b`" in text  # all of it counts as the user's
    assert text.count("<!-- hf-guided: ") == 1
    assert isinstance(json.loads(text.partition("<!-- hf-guided: ")[2].partition(" -->")[0]), dict)


def test_a_card_of_an_earlier_version_makes_way(tmp_path):
    """Its names were written as they are, a comment among them."""
    path = write(tmp_path, "digits", class_names=["a", "b"])
    from hf_guided.hub.card_edits import sign

    old = path.read_text().replace("`a`, `b`", "`<!-- hf-guided: [] -->`, `<b>`")
    path.write_text(sign(old))
    new = write(tmp_path, "digits", class_names=["<!-- hf-guided: [] -->", "<b>"], training={"steps": 7}).read_text()
    assert "| Steps | 7 |" in new
    assert "`<!-- hf-guided: [] -->`, `<b>`" in new
    assert new.count("## Classes") == 1


def test_a_space_of_hostile_names(tmp_path):
    names = {
        "model_id": "ada/`<b>`[x](y)",
        "judge_id": "](javascript:alert(1))\n\n# Results",
        "title": "a: [b\n---\n# c",
    }
    folder = write_space(tmp_path / "space", **names)
    page = Page((folder / "README.md").read_text())
    assert [tag for tag, _ in page.tags if tag in ("h1", "h2", "b", "script")] == []
    links = [about["href"] for tag, about in page.tags if tag == "a"]
    assert len(links) == 2
    assert all(link.startswith("https://huggingface.co/") for link in links)
    assert metadata_load(folder / "README.md")["title"] == "a: [b --- # c"
    show = "import ast, sys; print(ast.parse(open(sys.argv[1]).read()) is not None)"
    assert subprocess.run([sys.executable, "-c", show, folder / "app.py"], check=True, capture_output=True).stdout
