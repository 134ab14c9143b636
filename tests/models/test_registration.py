"""diffusers knows this package's classes by name. Both tables are its internals: here it shows if they move."""

import subprocess
import sys

import hf_guided

NAMES = ("ADMUNet2DModel", "ADMForImageClassification", "ADMImageProcessor", "ADMScheduler")


def test_tables_of_diffusers_hold_our_classes():
    from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES

    for name in NAMES:
        cls = getattr(hf_guided, name)
        for table in (LOADABLE_CLASSES["hf_guided"], ALL_IMPORTABLE_CLASSES):
            assert table[name] == ["save_pretrained", "from_pretrained"]
        assert all(callable(getattr(cls, method)) for method in LOADABLE_CLASSES["hf_guided"][name])


def test_the_tables_are_those_that_pipelines_are_loaded_with():
    """A pipeline finds the methods to save and load a component by walking these very tables."""
    from diffusers.pipelines import pipeline_loading_utils, pipeline_utils

    assert pipeline_utils.LOADABLE_CLASSES is pipeline_loading_utils.LOADABLE_CLASSES
    for name in NAMES:
        cls, candidates = pipeline_loading_utils.get_class_obj_and_candidates(
            library_name="hf_guided",
            class_name=name,
            importable_classes=pipeline_loading_utils.ALL_IMPORTABLE_CLASSES,
            pipelines=None,
            is_pipeline_module=False,
        )
        assert cls is candidates[name] is getattr(hf_guided, name)


def test_a_model_in_a_pipeline_is_recorded_by_the_packages_name():
    from diffusers.pipelines.pipeline_loading_utils import _fetch_class_library_tuple

    model = hf_guided.ADMScheduler()
    assert _fetch_class_library_tuple(model) == ("hf_guided", "ADMScheduler")


def test_importing_the_package_imports_neither_torch_nor_diffusers():
    code = "import sys, hf_guided; print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
