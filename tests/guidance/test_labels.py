"""Which class of a classifier is which of the pipeline's, found by name."""

import pytest
import torch
from guidance_helpers import NAMES, sample

from hf_guided.guidance import ClassifierGuidance, DenoisedClassifierGuidance
from hf_guided.labels import match_labels


@pytest.fixture(scope="module")
def match(make_pipe, make_resnet):
    """Matches all of the pipeline's labels, or some, with a classifier of other names."""

    def matched(theirs, ours=NAMES, labels=None):
        pipe = make_pipe(id2label=ours)
        labels = torch.tensor(list(ours) if labels is None else labels)
        return match_labels(pipe, make_resnet(id2label=theirs), labels).tolist()

    return matched


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        (NAMES, [0, 1, 2, 3, 4]),
        ({4 - label: name for label, name in NAMES.items()}, [4, 3, 2, 1, 0]),
        ({0: "daisy", 1: "pug", 2: "tench", 3: "agama", 4: "crane"}, [2, 4, 0, 3, 1]),
        ({0: "DAISY", 1: "Pug-dog", 2: " tinca Tinca ", 3: "agama", 4: "crane"}, [2, 4, 0, 3, 1]),
        ({0: "cat", 1: "pug, bulldog", 2: "agama", 3: "daisy", 4: "dog", 5: "crane", 6: "tench"}, [6, 5, 3, 2, 1]),
        ({label: f"LABEL_{label}" for label in range(5)}, [0, 1, 2, 3, 4]),
    ],
    ids=["same", "reversed", "synonyms", "case and spaces", "among others", "unnamed"],
)
def test_labels_are_matched_by_name(theirs, expected, match):
    assert match(theirs) == expected


def test_unnamed_classes_of_the_pipeline_are_matched_by_id(match):
    assert match(NAMES, {label: f"LABEL_{label}" for label in range(5)}) == [0, 1, 2, 3, 4]


def test_only_the_labels_that_are_asked_for_need_a_match(match):
    theirs = {0: "daisy", 1: "pug"}
    assert match(theirs, labels=[4, 2, 4]) == [1, 0, 1]
    with pytest.raises(ValueError, match="no class named 'tench, Tinca tinca', 'crane', 'agama', or several"):
        match(theirs)
    many = dict(enumerate("abcde"))
    with pytest.raises(ValueError, match="'a', 'b', 'c' and 2 more, or several"):
        match(theirs, many)


def test_a_full_name_goes_before_a_synonym(match):
    """As two classes of ImageNet are called."""
    suits = {0: "maillot", 1: "maillot, tank suit"}
    assert match({0: suits[1], 1: suits[0]}, suits) == [1, 0]


def test_duplicates(match):
    twice = {0: "tench", 1: "crane", 2: "daisy", 3: "crane", 4: "pug"}
    assert match(twice, twice) == [0, 1, 2, 3, 4]
    # at the same place as in the pipeline, a name that stands twice is no question
    assert match({**twice, 0: "dog"}, twice, labels=[1, 3]) == [1, 3]
    moved = {0: "crane", 1: "tench", 2: "crane", 3: "daisy", 4: "pug"}
    assert match(moved, twice, labels=[0, 2, 4]) == [1, 3, 4]
    with pytest.raises(ValueError, match="no class named 'crane', or several"):
        match(moved, twice)


@pytest.mark.parametrize("number", [4, 6])
def test_classes_without_names_must_be_as_many(number, match):
    with pytest.raises(ValueError, match=f"The classifier has {number} classes and the UNet 5"):
        match({label: f"LABEL_{label}" for label in range(number)})


@pytest.mark.parametrize(
    ("kind", "component"), [(ClassifierGuidance, "classifier"), (DenoisedClassifierGuidance, "clean_classifier")]
)
def test_the_order_of_a_classifiers_classes_changes_nothing(kind, component, make_pipe, make_classifier, make_resnet):
    make = make_classifier if component == "classifier" else make_resnet
    order = [3, 0, 4, 1, 2]
    one, other = make(id2label=NAMES), make(id2label={new: NAMES[old] for new, old in enumerate(order)})
    last = [parameter for parameter in other.parameters() if len(parameter) == 5][-2:]
    with torch.no_grad():
        for parameter in last:
            parameter.copy_(parameter[order])
    assert len(last) == 2
    expected = sample(make_pipe(id2label=NAMES, **{component: one}), [2, 0, 4], guidance=kind(20.0))
    shuffled = sample(make_pipe(id2label=NAMES, **{component: other}), [2, 0, 4], guidance=kind(20.0))
    assert (shuffled - expected).abs().max() < 1e-4
    assert (sample(make_pipe(guide_unet=None), [2, 0, 4], guidance=[]) - expected).abs().max() > 0.1


def test_a_clean_classifier_names_the_classes_of_an_unconditional_unet_only(make_pipe, make_resnet, make_unet):
    clean = make_resnet(id2label=NAMES)
    nameless = {"classifier": None, "clean_classifier": clean, "id2label": None}
    assert make_pipe(**nameless).id2label == {}
    alone = make_pipe(**nameless, unet=make_unet(num_class_embeds=None, null_class_label=False))
    assert alone.id2label == NAMES
    assert alone.num_classes == 5
