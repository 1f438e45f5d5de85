"""Every public name of version 0.1.0 (public-0.1.0.json, read from its source) works and warns once."""

import functools
import importlib
import importlib.util
import inspect
import json
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from scsa_book import renamed
from scsa_book.attention import registry
from scsa_book.attention.fca import FCA
from scsa_book.renamed import Renamed

PUBLIC = json.loads(Path(__file__).with_name("public-0.1.0.json").read_text("utf-8"))
ROWS = renamed.renamed()
KINDS = ("module", "name", "attribute", "parameter", "removed")
KIND = {kind: [row for row in ROWS if row.kind == kind] for kind in KINDS}


@pytest.fixture(autouse=True)
def fresh():
    "Every old name may warn again."
    renamed.warn_once.cache_clear()
    yield
    renamed.warn_once.cache_clear()


def quietly(call):
    "The result of a call and the warnings that it gave."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(w.message) for w in caught if w.category is DeprecationWarning]


REMOVED = {(row.module, row.old) for row in KIND["removed"]}
# Their parameters changed with what they do: a converted layer, a command that takes several experiments, and
# a job that counts its attempts itself.
OTHER_PARAMETERS = {"Instead(channels)", "Instead(stride)", "convolve_groups(convs)", "job(attempt)"}
# Steps of the fast path of 0.1.0 that mechanisms have no more: operators take them.
STEPS = {
    "PlaceLogits.logits",
    "TwoGates.attend",
    "ChannelSelfAttention.mixed",
    "ChannelSelfAttention.channel_gates",
}
STEPS |= {"Heads.join", "Halves.halves", "Fused.fused", "Fused.heard"}
STEPS |= {"StripGates.joined", "StripGates.gates"}


@functools.cache
def old_object(module: str, name: str):
    return quietly(lambda: getattr(importlib.import_module(module), name))[0]


# ---- what was public


def old_objects(module: str) -> dict[str, object]:
    "The public names of a module of 0.1.0 and what they are now."
    return {name: old_object(module, name) for name in PUBLIC[module] if (module, name) not in REMOVED}


@pytest.mark.parametrize("module", PUBLIC)
def test_every_module_of_0_1_0_can_be_imported_with_all_of_its_names(module):
    found = quietly(lambda: importlib.import_module(module))[0]
    lost = [name for name in PUBLIC[module] if not quietly(lambda: hasattr(found, name))[0]]  # noqa: B023
    assert [name for name in lost if (module, name) not in REMOVED] == []


def accepts(function, parameter: str) -> bool:
    "Whether a function takes a parameter, by its own signature or by the table."
    path, module = function.__qualname__, function.__module__
    given = inspect.signature(function).parameters
    renames = [row.old.rpartition(".") for row in KIND["parameter"] if row.module == module]
    known = {old for owner, _, old in renames if owner == path} | set(given)
    return parameter in known or any(p.kind is p.VAR_KEYWORD for p in given.values())


@pytest.mark.parametrize(
    "module", [m for m in PUBLIC if m != "scsa_book.cli"]
)  # its interface is the command line
def test_every_parameter_of_0_1_0_is_taken(module):
    found = {name: f for name, f in old_objects(module).items() if PUBLIC[module][name].get("parameters")}
    lost = [
        f"{name}({parameter})"
        for name, function in found.items()
        for parameter in PUBLIC[module][name]["parameters"]
        if not accepts(function, parameter)
    ]
    assert [path for path in lost if path not in OTHER_PARAMETERS] == []


def fields_and_members(cls) -> set[str]:
    "What a class or its instances have: members, annotations, and what its methods set."
    found = set(dir(cls)) | set(getattr(cls, "model_fields", {}))
    for base in cls.__mro__:
        found |= set(getattr(base, "__annotations__", {}))
        if base.__module__.startswith("scsa_book"):
            source = inspect.getsource(base)
            found |= set(re.findall(r"self\.(\w+)", source))
            found |= set(re.findall(r"(?:add_module|register_\w+)\(\"(\w+)", source))
    return found


@pytest.mark.parametrize("module", PUBLIC)
def test_every_attribute_and_method_of_0_1_0_is_there(module):
    lost = [
        f"{name}.{member}"
        for name, found in old_objects(module).items()
        if isinstance(found, type) and "attributes" in PUBLIC[module][name]
        for member in (*PUBLIC[module][name]["attributes"], *PUBLIC[module][name]["methods"])
        if member not in fields_and_members(found)
    ]
    assert [path for path in lost if path not in STEPS and (module, path) not in REMOVED] == []


# ---- the table


MOVED = """
import warnings
from importlib import import_module
from scsa_book.paths import importing
warnings.simplefilter("always")
with importing():
    for old, new in PAIRS:
        assert import_module(old) is import_module(new), old
        import_module(old)
"""


def test_an_old_module_is_the_new_one_and_says_so_once(executed):
    rows = [row for row in KIND["module"] if row.new]
    status, said = executed(MOVED.replace("PAIRS", repr([(row.old, row.new) for row in rows])))
    assert status == 0, said
    for row in rows:
        assert said.count(f"{row.old} was renamed: use {row.new}") == 1, row.old


@pytest.mark.parametrize("row", KIND["name"], ids=lambda row: f"{row.module}.{row.old}")
def test_an_old_name_is_the_new_object_and_says_so_once(row: Renamed):
    module = quietly(lambda: importlib.import_module(row.module))[0]
    assert row.old not in vars(module), "a name that is not old"
    where, _, name = row.new.rpartition(".")
    new = getattr(importlib.import_module(where) if where else module, name)
    results = [quietly(lambda: getattr(module, row.old)) for _ in range(2)]
    assert all(found is new for found, _ in results)
    assert [said for _, said in results] == [[f"{row.module}.{row.old} was renamed: use {row.new}"], []]


@pytest.mark.parametrize("row", KIND["removed"], ids=lambda row: f"{row.module}.{row.old}")
def test_the_error_of_a_removed_name_says_what_to_use(row: Renamed):
    module = quietly(lambda: importlib.import_module(row.module))[0]
    with pytest.raises(AttributeError, match=re.escape(f"{row.module}.{row.old} was removed: {row.new}")):
        getattr(module, row.old)
    for path in re.findall(r"scsa_book[\w.]+", row.new):
        assert importlib.util.find_spec(path), "a module to use that is not there"


def test_a_module_that_became_several_gives_its_names_and_warns(executed):
    code = "import warnings; warnings.simplefilter('always'); "
    code += "import scsa_book.pooling as a, scsa_book.operators.pooling as b; assert a.fitting is b.fitting"
    status, said = executed(code)
    assert status == 0 and said.count("DeprecationWarning") == 2


def owner(row: Renamed):
    return getattr(importlib.import_module(row.module), row.old.split(".")[0])


@pytest.mark.parametrize("row", KIND["attribute"], ids=lambda row: f"{row.module}.{row.old}")
def test_an_old_attribute_reads_and_sets_the_new_one_and_says_so_once(row: Renamed):
    old = row.old.split(".")[1]
    property_ = inspect.getattr_static(owner(row), old)
    assert isinstance(property_, property) and row.new in fields_and_members(owner(row))

    class Holder:
        pass

    setattr(Holder, old, property_)
    holder = Holder()
    setattr(holder, row.new, "value")
    results = [quietly(lambda: getattr(holder, old)) for _ in range(2)]
    assert [found for found, _ in results] == ["value"] * 2
    assert [len(said) for _, said in results] == [1, 0]
    assert re.search(rf"\.{old} was renamed: use {row.new}$", results[0][1][0])
    quietly(lambda: setattr(holder, old, "other"))
    assert getattr(holder, row.new) == "other"


@pytest.mark.parametrize("row", KIND["parameter"], ids=lambda row: f"{row.module}.{row.old}")
def test_an_old_parameter_is_the_new_one(row: Renamed):
    *path, old = row.old.split(".")
    found = owner(row)
    for name in path[1:]:
        found = inspect.getattr_static(found, name)
    function = found.__init__ if isinstance(found, type) else found
    parameters = inspect.signature(function).parameters
    assert row.new in parameters and old not in parameters, "the function takes it anyway"
    names = inspect.getclosurevars(function).nonlocals["names"]
    assert names[old] == row.new


def test_a_function_gets_what_was_given_under_the_old_parameter():
    from scsa_book.evidence.tables import verdict

    old, said = quietly(lambda: [verdict("matches", dress="close") for _ in range(2)])
    assert old == [verdict("matches", style="close")] * 2
    assert said == ["verdict(dress=...) was renamed: use style"]


def test_a_class_gets_what_was_given_under_the_old_parameter():
    from scsa_book.data.annotations import Annotations

    old, said = quietly(lambda: Annotations("train", (), pictures=(1, 2)))
    assert old == Annotations("train", (), images=(1, 2)) and old.images == (1, 2) and len(said) == 1
    assert quietly(lambda: old.pictures)[0] == (1, 2)


def test_nothing_is_renamed_twice():
    keys = [(row.kind, row.module, row.old) for row in ROWS]
    assert len(keys) == len(set(keys)) and keys


def test_new_names_say_nothing(executed):
    code = (
        "import warnings; warnings.filterwarnings('error', '.* was renamed', DeprecationWarning)\n"
        "from scsa_book.paths import importing\n"
        "with importing(): import scsa_book.data.images, scsa_book.attention.sa, scsa_book.evidence.ledger"
    )
    assert executed(code) == (0, "")


def test_an_unknown_name_is_still_an_error():
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        importlib.import_module("scsa_book.data.images").no_such_name  # noqa: B018


# ---- what was saved


def test_a_state_dict_of_0_1_0_is_loaded():
    new, old = FCA(32, size=7), FCA(32, size=7)
    with torch.no_grad():
        new.reduce.weight.uniform_()
    state = {name.replace(".basis", ".waves"): t for name, t in new.state_dict().items()}
    assert "rows.waves" in state and "rows.basis" not in state
    assert str(old.load_state_dict(state)) == "<All keys matched successfully>"
    x = torch.randn(1, 32, 7, 9)
    assert torch.equal(old(x), new(x)) and "rows.waves" in state


def test_a_pickled_class_of_0_1_0_is_found():
    found, _ = quietly(lambda: pickle.loads(b"cscsa_book.data.images\nImageSet\n."))
    assert found.__name__ == "ImageDataset"


@pytest.mark.parametrize("key", ["overrides", "instead"])
def test_an_experiment_is_read_with_either_key(key):
    from scsa_book.training.experiments import Experiment

    given = {"title": "t", "preset": "cpu", "runs": [{}], "at": {"sample": {key: {"epochs": 2}}}}
    assert Experiment(**given).at["sample"].overrides == {"epochs": 2}


def test_results_of_speed_of_0_1_0_are_read():
    from scsa_book.evidence import speed

    kinds = {"modules": speed.ModulesResult, "networks": speed.NetworksResult}
    files = [p for p in (ROOT / "nbs/results/speed").glob("*.json") if p.name.split("-")[0] in kinds]
    for path in files:
        kinds[path.name.split("-")[0]].model_validate_json(path.read_text("utf-8"))
    assert any('"kept"' in path.read_text("utf-8") for path in files)
    assert any('"machinery"' in path.read_text("utf-8") for path in files)


def test_results_keep_their_identifiers():
    from scsa_book.training.result import load_result

    paths = sorted((ROOT / "nbs/results").glob("*/*_seed*.json"))
    assert len(paths) > 50
    assert [path.name for path in paths if load_result(path).config.id != path.stem] == []


def test_mechanisms_are_named_as_before():
    assert {"scsa", "smsa", "pcsa", "cat", "sa", "fca"} <= set(registry.names())
