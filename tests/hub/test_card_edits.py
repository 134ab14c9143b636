"""What a user wrote into a card is there after the next card, and the rest of it is new."""

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_guided.hub import write_model_card
from hf_guided.hub.card_edits import merge, sign


def write(folder, **changes):
    arguments = {"title": "Digits", "dataset": "digits", "class_names": ["0", "1"], "training": {"steps": 100}}
    return write_model_card(folder, **arguments | changes)


def edit(path, *changes):
    text = path.read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)


def test_edits_survive_and_the_rest_is_new(tmp_path):
    path = write(tmp_path, license="mit")
    edit(
        path,
        ("license: mit\n", "license: cc-by-4.0\nlanguage:\n- de\n"),  # a key changed, a key added
        ("## Classes\n", "## Thanks\n\nTo Ada.\n\n## Classes\n"),  # a section added
        ("- Its images are synthetic", "- They are for a children's book.\n- Its images are synthetic"),  # one changed
    )
    text = path.read_text()
    start, end = text.index("## Usage"), text.index("## Thanks")
    path.write_text(text[:start] + text[end:])  # and removed
    with path.open("a") as file:
        file.write("\n## Contact\n\n```\n# not a heading\n```\n")  # and added, where anyone would, at the end

    for title, steps in (("Better digits", 200), ("Best digits", 300)):
        text = write(tmp_path, license="mit", title=title, training={"steps": steps}).read_text()
        for line in ("To Ada.", "- They are for a children's book.", "# not a heading", f"| Steps | {steps} |"):
            assert text.splitlines().count(line) == 1, line
        assert f"# {title}\n" in text
        assert "| Steps | 100 |" not in text
        headings = [line for line in text.splitlines() if line.startswith("## ")]
        assert headings == ["## Thanks", "## Classes", "## Intended use and limitations", "## Training", "## Contact"]
        data = ModelCard(text).data
        assert (data.license, data.language) == ("cc-by-4.0", ["de"])
        assert data.tags[0] == "hf-guided"


def test_without_edits_the_card_is_the_new_one_to_the_byte(tmp_path):
    for folder in ("fresh", "again"):
        (tmp_path / folder).mkdir()
    new = {
        "title": "Better",
        "training": None,
        "results": [{"guidance_scale": 1.0, "fid/judge": 2.0}],
        "license": "mit",
    }
    write(tmp_path / "again")
    assert write(tmp_path / "again", **new).read_bytes() == write(tmp_path / "fresh", **new).read_bytes()
    windows = (tmp_path / "fresh" / "README.md").read_text().replace("\n", "\r\n")
    assert merge(windows, (tmp_path / "fresh" / "README.md").read_text()) == (tmp_path / "fresh/README.md").read_text()


def test_what_is_generated_no_more_goes_and_what_is_new_comes(tmp_path):
    write(tmp_path, license="mit")
    text = write(tmp_path, class_names=(), results=[{"fid/judge": 2.0}], dataset_id="ada/digits").read_text()
    assert "## Classes" not in text
    assert "license" not in yaml.safe_load(text.split("---")[1])
    assert yaml.safe_load(text.split("---")[1])["datasets"] == ["ada/digits"]
    assert text.index("## Training") < text.index("## Results")


def test_a_card_by_hand_gains_what_it_lacks_and_loses_nothing(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nHello.\n\n## Usage\n\nAs you like.\n")
    text = write(tmp_path, license="apache-2.0").read_text()
    assert "Hello." in text
    assert "As you like." in text
    assert "## Training" in text
    assert "from_pretrained" not in text
    assert ModelCard(text).data.license == "mit"


def test_the_comment_is_out_of_the_way_and_may_be_broken(tmp_path):
    path = write(tmp_path, title="a --> b -- c")
    assert path.read_text().partition("<!-- hf-guided: ")[2].count("--") == 1  # two would end it
    path.write_text(path.read_text().replace("Training", "How").replace("license", "permission"))
    text = write(tmp_path, title="a --> b -- c", training={"steps": 200}).read_text()
    assert "## How" in text
    assert "## Training" not in text
    assert "## Classes" in write(tmp_path, class_names=["2", "3"]).read_text()
    assert "`2`, `3`" in path.read_text()

    edit(path, ('{"metadata"', "{metadata"))
    assert "`2`, `3`" in write(tmp_path).read_text()  # all of it is the user's then
    assert write(tmp_path).read_text().count("<!-- hf-guided") == 1


def test_broken_metadata_are_told(tmp_path):
    path = write(tmp_path)
    edit(path, ("library_name: diffusers", "library_name: [diffusers"))
    with pytest.raises(ValueError, match=r"README.md has metadata that are not valid YAML"):
        write(tmp_path)
    with pytest.raises(ValueError, match="not a mapping"):
        merge("---\n- a\n---\n", sign("# A\n"))
