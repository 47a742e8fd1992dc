"""PEFT's module paths under pylora."""

import ast
import importlib
import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import pylora
from pylora import _peft_paths
from pylora.config.later import LATER


@pytest.mark.parametrize("path", sorted(_peft_paths.PATHS))
def test_every_name_of_a_path_resolves(path):
    module = importlib.import_module(f"pylora.{path}")
    for name in _peft_paths.PATHS[path]:
        home, own_name = _peft_paths.HOMES[name]
        assert getattr(module, name) is getattr(importlib.import_module(home), own_name), name


def test_no_home_is_without_a_path():
    offered = {name for names in _peft_paths.PATHS.values() for name in names}
    assert set(_peft_paths.HOMES) - offered == set()


def _peft_names(path):
    """The names that PEFT's module of that path has at its top, from its source."""
    root = Path(importlib.util.find_spec("peft").submodule_search_locations[0])
    file = root.joinpath(*path.split("."))
    source = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom | ast.Import):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


@pytest.mark.parametrize("path", sorted(_peft_paths.PATHS))
def test_a_path_offers_only_what_peft_has_there(path):
    assert set(_peft_paths.PATHS[path]) - _peft_names(path) == set()


def test_the_top_offers_every_lora_name_of_peft():
    peft = pytest.importorskip("peft")
    missing = {
        name for name in peft.__all__ if name not in pylora.__all__ and not _peft_paths.belongs_to_other_method(name)
    }
    assert missing == set()


@pytest.mark.parametrize("name", sorted(LATER))
def test_names_whose_mechanism_comes_later_import_and_refuse_to_be_used(name):
    home, own_name = _peft_paths.HOMES[name]
    value = getattr(importlib.import_module(home), own_name)
    assert not isinstance(pylora.LoraConfig(), value)
    with pytest.raises(pylora.UnsupportedFeatureError, match=f"{name}: pylora has no mechanism"):
        value("model", key=1)
    with pytest.raises(pylora.UnsupportedFeatureError, match="pylora has no mechanism"):
        type("Mine", (value,), {})()


@pytest.mark.parametrize("name", ["config", "optimizers", "tuners", "utils", "mapping", "peft_model", "helpers"])
def test_modules_are_attributes_of_pylora_without_an_import(name):
    code = f"import pylora; print(pylora.{name}.__name__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == f"pylora.{name}"


def test_packages_contain_their_modules():
    from pylora.tuners import lora

    assert lora.layer.LoraLayer is lora.LoraLayer
    assert pylora.tuners.lora is lora
    assert sys.modules["pylora.tuners.lora.layer"] is lora.layer


def test_a_real_module_goes_before_the_table():
    assert importlib.import_module("pylora.config").__file__.endswith("__init__.py")


def test_star_import_and_dir():
    namespace = {}
    exec("from pylora.utils import *", namespace)
    assert namespace["PeftType"] is pylora.PeftType
    assert "_get_submodules" not in namespace
    assert "_get_submodules" in dir(importlib.import_module("pylora.utils"))


def test_classes_are_pickled_by_where_they_live():
    from pylora.tuners.lora.config import LoraConfig

    assert pickle.loads(pickle.dumps(LoraConfig(r=3))).r == 3


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("from pylora import IA3Config", "IA3Config"),
        ("from pylora import PrefixTuningConfig, LoraConfig", "PrefixTuningConfig"),
        ("from pylora import PeftMixedModel", "PeftMixedModel"),
        ("from pylora import initialize_kv_prefix_from_text", "initialize_kv_prefix_from_text"),
        ("from pylora.tuners import LoHaConfig", "LoHaConfig"),
        ("from pylora.utils.peft_types import register_peft_method", "register_peft_method"),
        ("import pylora.tuners.ia3", "tuners.ia3"),
        ("from pylora.tuners.lokr.layer import LoKrLayer", "tuners.lokr"),
    ],
)
def test_names_of_other_methods_say_that_pylora_is_lora(statement, name):
    with pytest.raises(ImportError, match=r"pylora is LoRA") as caught:
        exec(statement)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "statement",
    ["from pylora import Nonsense", "from pylora.utils import Nonsense", "import pylora.utils.nonsense"],
)
def test_unknown_names_are_plain_import_errors(statement):
    with pytest.raises(ImportError, match=r"(?i)nonsense") as caught:
        exec(statement)
    assert "pylora is LoRA" not in str(caught.value)


def test_unknown_attributes_are_attribute_errors():
    assert not hasattr(pylora, "Nonsense")
    assert not hasattr(importlib.import_module("pylora.tuners.lora"), "__nonsense__")


def test_peft_names_all_other_methods_correctly():
    peft = pytest.importorskip("peft")
    other = {name for name in peft.__all__ if _peft_paths.belongs_to_other_method(name)}
    lora_only = {"LoraConfig", "LoraModel", "VeloraConfig", "BdLoraConfig", "KasaConfig", "PeftModel", "LoraGAConfig"}
    assert not other & lora_only
    assert {"VeraConfig", "XLoraModel", "RandLoraConfig"} <= other


def test_the_hook_is_there_once():
    _peft_paths.install()
    finders = [finder for finder in sys.meta_path if type(finder).__module__ == "pylora._peft_paths"]
    assert len(finders) == 1


def test_importing_pylora_imports_no_library():
    code = (
        "import sys, pylora, pylora.tuners.lora\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'numpy', 'accelerate') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
