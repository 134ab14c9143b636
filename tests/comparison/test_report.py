import base64
import copy
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from hf_guided.comparison.plots import save_curves, save_grids
from hf_guided.comparison.report import comparison_table, findings, write_comparison

SEEDS = (0, 1, 2)


def run(family, seed, title=None, **changes):
    """A run in which every number is there; keys of `metrics` may be changed like the others."""
    metrics = {"accuracy": 0.9, "fid": 2.0, "kid": 0.01, "inception_score": 9.0, "precision": 0.9, "recall": 0.8}
    metrics |= {"density": 1.0, "coverage": 0.7}
    whole = {"family": family, "title": title or family, "seed": seed, "parameters": 512345, "memory_bytes": 2**27}
    whole |= {"steps": 2400, "train_seconds": 180.0, "seconds_per_image": 0.002, "bits_per_dim": None}
    whole |= {"bits_kind": None, "no_bits": None, "copied_share": 0.008, "notes": [], "curve": None, "losses": {}}
    metrics |= {key: changes.pop(key) for key in list(changes) if key in metrics}
    return whole | changes | {"metrics": metrics}


def family_of(name, title=None, **series):
    """Runs of a family, one value of each series per seed."""
    count = len(next(iter(series.values())))
    return [run(name, seed, title, **{key: values[seed] for key, values in series.items()}) for seed in range(count)]


def compared(*families, real=None):
    settings = {"data": "digits", "budget": "3 minutes", "seeds": list(SEEDS), "num_images": 2000, "features": "judge"}
    settings |= {"hardware": "2 CPU threads, Linux", "class_names": ["0", "1"]}
    return {"settings": settings, "real": real, "runs": [one for runs in families for one in runs]}


def finding(comparison, start):
    """The one finding that starts so."""
    (sentence,) = [sentence for sentence in findings(comparison) if sentence.startswith(start)]
    return sentence


def row(comparison, name):
    """The cells of a row of the Markdown table, by column."""
    header, _, *rows = (line for line in comparison_table(comparison).splitlines() if line.startswith("|"))
    header, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in (header, *rows))
    (found,) = [cells for cells in rows if cells[0] == name]
    return dict(zip(header, found, strict=True))


def test_table_cells():
    vae = family_of(
        "vae", "VAE", fid=[2.0, 4.0, 3.0], precision=[0.5, 0.5, 0.5], bits_per_dim=[3.2, 3.3, 3.25],
        bits_kind=["bound"] * 3, memory_bytes=[2**27, 2**27, 2**31], kid=[0.001, 0.002, 0.003],
    )  # fmt: skip
    flow = family_of("flow", bits_per_dim=[2.9], bits_kind=["exact"], fid=[12345.6])
    gan = family_of("gan", "GAN", no_bits=["it has no likelihood"] * 2, steps=[1000, 1234])
    comparison = compared(vae, flow, gan, real={"metrics": {"fid": 0.3321, "accuracy": 0.98}})
    assert row(comparison, "VAE") == {
        "": "VAE", "FID": "3 (2–4)", "KID": "0.002 (0.001–0.003)", "precision": "0.500", "recall": "0.800",
        "density": "1.000", "coverage": "0.700", "Inception Score": "9", "accuracy": "0.900", "copied": "0.8 %",
        "bits/dim": "≤ 3.25 (3.20–3.30)", "spread": "2", "s/image": "0.002", "parameters": "512,345",
        "memory": "768 MiB (128 MiB–2.00 GiB)", "steps": "2,400",
    }  # fmt: skip
    one_seed = row(comparison, "flow")
    assert (one_seed["FID"], one_seed["bits/dim"], one_seed["spread"]) == ("12,346", "2.90", "–")
    assert row(comparison, "GAN")["bits/dim"] == "none"
    assert row(comparison, "GAN")["steps"] == "1,117 (1,000–1,234)"
    real = row(comparison, "held-out images")
    assert (real["FID"], real["accuracy"], real["precision"], real["bits/dim"]) == ("0.3321", "0.980", "–", "–")
    table = comparison_table(comparison)
    assert "- GAN has no bits/dim: it has no likelihood.\n" in table
    assert "- flow: seed 0 only.\n" in table
    assert "- GAN: seeds 0, 1 only.\n" in table
    assert "- spread: the highest FID of the seeds divided by the lowest" in table
    assert "held-out images |" not in comparison_table(compared(vae))


def test_what_is_missing_is_left_out():
    bare = run("my-gan", 0, steps=None, train_seconds=None, copied_share=None, seconds_per_image=None)
    bare["metrics"] = {"fid": float("nan")}
    comparison = compared([bare])
    cells = row(comparison, "my-gan")
    assert {cells[name] for name in ("steps", "s/image", "spread")} == {"–"}
    assert not {"FID", "accuracy", "copied"} & cells.keys()
    assert findings(comparison) == []
    assert "copied" not in comparison_table(comparison).split("\n\n")[1]
    # Beside a family that has them: nothing to compare with, so nothing is said of the best.
    known = [
        sentence for sentence in findings(compared([bare], family_of("vae", fid=[1.0, 2.0]))) if "Best" in sentence
    ]
    assert known == []


@pytest.mark.parametrize(
    ("gan", "diffusion", "best", "answer"),
    [
        ([1, 1.1, 1.2], [2, 2.1, 2.2], "GAN, 1.1 (1–1.2), ahead of every other family with every seed", "no, GAN wins"),
        ([2, 2.1, 2.2], [1, 1.1, 1.2], "DM, 1.1 (1–1.2), ahead of every other family with every seed", "yes, with"),
        # The mean decides who is named, the ranges overlap and the seeds disagree.
        ([1, 2, 3], [2, 3, 1.5], "GAN, 2 (1–3), but it and DM are not separated by these seeds", "they are not"),
        # Ahead at each seed, and yet the best of the one is worse than the worst of the other.
        ([1, 2, 3], [1.5, 2.5, 3.5], "GAN, 2 (1–3), ahead of DM with each seed, but the ranges overlap", "GAN is"),
        ([1], [2], "GAN, 1, ahead of DM by a single run, which says nothing about other seeds", "no, GAN wins, but by"),
        ([2], [2, 1, 3], "but it and DM are not separated by these seeds", "they are not"),
    ],
)  # fmt: skip
def test_who_is_best_follows_the_numbers(gan, diffusion, best, answer):
    comparison = compared(family_of("gan", "GAN", fid=gan), family_of("diffusion", "DM", fid=diffusion))
    assert best in finding(comparison, "Best FID: ")
    assert f"FID: {answer}" in finding(comparison, "Does DM beat GAN? ")
    # Higher is better for the others, so that the same numbers turn the answer round.
    turned = compared(family_of("gan", "GAN", recall=gan), family_of("diffusion", "DM", recall=diffusion))
    winner = finding(turned, "Best recall: ").split()[2].strip(",")
    if "wins with" in answer or answer.startswith("yes"):
        assert (winner == "DM") == answer.startswith("no")
        turned_answer = "yes, with every seed" if winner == "DM" else "no, GAN wins with every seed"
        assert f"recall: {turned_answer}" in finding(turned, "Does DM beat GAN? ")


def test_the_best_against_each_of_several():
    comparison = compared(
        family_of("vae", fid=[9, 9.1, 9.2]), family_of("gan", fid=[1.5, 2, 4]), family_of("guided", fid=[1, 1.6, 3])
    )
    assert finding(comparison, "Best FID").endswith(
        "ahead of vae with every seed; ahead of gan with each seed, but the ranges overlap: they are not separated "
        "by these seeds."
    )
    assert not [sentence for sentence in findings(comparison) if "diffusion" in sentence]  # it is not there
    assert finding(comparison, "Seeds differ most").startswith(
        "Seeds differ most for guided, whose highest FID is 3 times"
    )
    assert "least for vae, 1.02 times" in finding(comparison, "Seeds differ most")


def test_what_guidance_changes_is_paired_by_seed():
    plain = family_of("diffusion", precision=[0.8, 0.82, 0.9], recall=[0.9, 0.9, 0.9], fid=[3, 2, 1], accuracy=[1] * 3)
    guided = family_of(
        "guided", precision=[0.83, 0.85, 0.93], recall=[0.8, 0.8, 0.8], fid=[2, 1, 1.5], accuracy=[1] * 3
    )
    sentence = finding(compared(plain, guided), "Effect of guidance on")
    assert "precision rises with every seed (0.840 to 0.870), recall falls with every seed (0.900 to 0.800)" in sentence
    assert "FID rises with 1 and falls with 2 of 3 seeds (2 to 1.5)" in sentence
    assert "accuracy stays the same with every seed" in sentence
    assert sentence.endswith("Guidance trades recall for precision.")
    for one in guided:
        one["family"], one["title"] = "diffusion", "diffusion"
    for one in plain:
        one["family"], one["title"] = "guided", "guided"
    turned = finding(compared(guided, plain), "Effect of guidance on")
    assert "precision falls with every seed (0.870 to 0.840), recall rises with every seed" in turned
    assert "trades" not in turned
    # Seeds that only one of them has are no part of it.
    assert "precision falls with the one seed (0.830 to 0.800)" in finding(
        compared(guided[:2], [plain[0], plain[2]]), "Effect of guidance on"
    )


def test_bits_per_dim():
    flow = family_of("flow", bits_per_dim=[3.0, 3.1], bits_kind=["exact"] * 2)
    vae = family_of("vae", "VAE", bits_per_dim=[3.4, 3.5], bits_kind=["bound"] * 2)
    gan = family_of("gan", "GAN", no_bits=["no likelihood."] * 2)
    comparison = compared(flow, vae, gan)
    assert finding(comparison, "Lowest bits/dim") == (
        "Lowest bits/dim: flow, 3.05 (3.00–3.10), ahead of every other family with every seed. For VAE only an upper "
        "bound is known; the true value may be lower."
    )
    assert finding(comparison, "No bits/dim") == "No bits/dim: GAN (no likelihood)."
    for one in vae:
        one["bits_per_dim"] -= 1
    lower = finding(compared(flow, vae), "Lowest bits/dim")
    assert lower == "Lowest bits/dim: VAE, at most 2.45 (2.40–2.50), ahead of every other family with every seed."


def test_speed_copies_and_notes():
    comparison = compared(
        family_of("diffusion", seconds_per_image=[0.2, 0.2], copied_share=[0.02, 0.03]),
        family_of(
            "gan", "GAN", seconds_per_image=[0.001] * 2, copied_share=[0.005, 0.03], notes=[["class 3 is gone."]] * 2
        ),
    )
    speed = finding(comparison, "Fastest to sample: GAN, 0.001 s per image")
    assert speed.endswith("Relative times: diffusion 200.")
    copies = finding(comparison, "Samples closer to a training image than all but 1 % of held-out images are: ")
    assert copies.endswith("diffusion 2.5 % (2.0 %–3.0 %), GAN 1.7 % (0.5 %–3.0 %); diffusion above that in every run.")
    assert finding(comparison, "GAN, seed") == "GAN, seeds 0, 1: class 3 is gone."
    comparison["runs"][0]["copied_share"] = 0.01  # what held-out images have
    assert finding(comparison, "Samples closer").endswith("no family is above that in every run.")


def pictures(count, size=8):
    return [Image.new("L", (size, size), 40 * i) for i in range(count)]


def drawable(title="GAN"):
    """Everything that can be drawn, once."""
    points = [{"value": v, "metrics": {"precision": 0.9 - v / 9, "recall": v}} for v in (0.5, 0.7)]
    curve = {"name": "truncation", "points": points}
    losses = {"generator_loss": [[0.0, 2.0], [1.0, 0.01]], "held_out/generator_loss": [[0.0, 2.1]], "empty": []}
    gan = family_of("gan", title, fid=[1.0, 1.3], curve=[curve, None], losses=[losses, {}])
    return compared(gan, [run("mine", 0, "mine")], real={"metrics": {"fid": 0.3, "precision": 0.9, "recall": 0.9}})


def test_grids_stand_side_by_side(tmp_path):
    names, titles = ["zero", "one"], {"real": "real", "vae": "VAE", "gan": "GAN"}
    save_grids({"real": pictures(6)}, names, tmp_path / "one.png", titles)
    save_grids({"real": pictures(6), "vae": pictures(6), "gan": pictures(6, 16)}, names, tmp_path / "three.png", titles)
    one, three = Image.open(tmp_path / "one.png"), Image.open(tmp_path / "three.png")
    # The 16-pixel images set the size of all: 64 pixels, four and eight times.
    large = {"real": pictures(6, 16), "vae": pictures(6, 16), "gan": pictures(6, 16)}
    save_grids(large, names, tmp_path / "large.png", titles)
    assert Image.open(tmp_path / "large.png").size == three.size
    # The names stand at the left of the first only: the others are narrower.
    assert 2 * one.width < three.width < 3 * one.width + 3 * 3 * 8
    with pytest.raises(ValueError, match=r"same number of images; got \{'real': 6, 'vae': 4\}"):
        save_grids({"real": pictures(6), "vae": pictures(4)}, names, tmp_path / "no.png", titles)
    assert not (tmp_path / "no.png").exists()


def test_curves_grow_with_the_families_that_were_trained(tmp_path):
    comparison = drawable()
    save_curves(comparison, tmp_path / "curves.png")
    for one in comparison["runs"]:
        one["losses"], one["metrics"] = {}, {}
    comparison["real"] = None
    save_curves(comparison, tmp_path / "bare.png")  # nothing there to draw
    sizes = [Image.open(tmp_path / name).size for name in ("curves.png", "bare.png")]
    assert sizes == [(1560, 1080), (1560, 744)]


def test_the_sheet_is_whole_and_escapes_names(tmp_path):
    comparison = drawable(title="<b>G</b>|x")
    comparison["settings"]["data"] = "<script>alert(1)</script>"
    grids = {"gan": pictures(4), "mine": pictures(4)}
    write_comparison(tmp_path / "new", comparison, grids, {"gan": "<b>G</b>", "mine": "mine"})
    files = {"comparison.json", "comparison.md", "comparison.html", "grids.png", "curves.png"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == files  # no temporary file is left
    assert json.loads((tmp_path / "new" / "comparison.json").read_text()) == comparison
    page = (tmp_path / "new" / "comparison.html").read_text()
    assert "<script" not in page
    assert "<b>" not in page
    assert page.count("&lt;b&gt;G&lt;/b&gt;|x") > 3  # table, findings
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(one) for one in embedded] == [
        (tmp_path / "new" / name).read_bytes() for name in ("grids.png", "curves.png")
    ]
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)  # nothing is loaded from elsewhere
    sheet = (tmp_path / "new" / "comparison.md").read_text()
    assert r"| \<b>G\</b>\|x | 1.15 (1–1.3) |" in sheet
    assert "- Best FID: " in sheet
    assert "](grids.png)" in sheet
    assert "](curves.png)" in sheet


def test_a_failed_write_keeps_the_old_sheet(tmp_path):
    comparison, grids = drawable(), {"gan": pictures(4), "mine": pictures(4)}
    titles = {"gan": "GAN", "mine": "mine"}
    write_comparison(tmp_path, comparison, grids, titles)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = copy.deepcopy(comparison)
    broken["settings"]["budget"] = object()  # what JSON cannot hold
    with pytest.raises(TypeError):
        write_comparison(tmp_path, broken, grids, titles)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_readmes_table_is_that_of_the_committed_run():
    root = Path(__file__).parents[2]
    committed = json.loads((root / "tests" / "benchmarks" / "families_on_digits.json").read_text())
    table = comparison_table(committed).partition("\n\n")[0]
    readme = (root / "hf_guided" / "comparison" / "README.md").read_text()
    assert table in readme
    claims = findings(committed)  # which the lesson repeats
    assert any(claim.startswith("Best recall: Diffusion, 0.916") for claim in claims)
    assert any("Guided diffusion beat GAN? FID: they are not separated" in claim for claim in claims)
