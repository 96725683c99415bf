"""What is written twice is compared."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import normfree
from normfree.cli import COMMANDS
from normfree.cli.settings import SECTIONS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_readme_names_every_command_and_no_other() -> None:
    """Each `normfree X` of README.md is a command, and each command is there."""
    named = set(re.findall(r"(?:^| |/)normfree ([a-z]+)", README, re.MULTILINE)) - {"for"}
    assert named == set(COMMANDS)


def test_the_readmes_code_runs(narrow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples of the library, word for word but with a smaller network, and its weights under the name of F0's."""
    monkeypatch.chdir(tmp_path)
    normfree.export_weights(normfree.create_model(narrow), "F0_haiku.npz", "authors")
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    for text in blocks:
        exec(compile(text.replace("nfnet_f0", narrow), "README.md", "exec"), {})


def test_the_public_names_are_there() -> None:
    """Names that checks outside the project call."""
    for name in (
        "list_models",
        "create_model",
        "load_weights",
        "save_weights",
        "export_weights",
        "fold",
        "convert",
        "param_groups",
        "clip_grad_agc_",
        "EMA",
        "WarmupCosine",
    ):
        assert callable(getattr(normfree, name))
        assert name in dir(normfree)
    assert "AGCSGD" in dir(normfree.optim)
    assert set(SECTIONS) == {"model", "data", "optim", "train"}


def test_importing_the_library_is_free_and_its_parts_need_no_command_line() -> None:
    """`import normfree` loads no torch; nn, models, optim and data load no command-line or plotting package."""
    import subprocess

    script = (
        "import sys, normfree; assert 'torch' not in sys.modules;"
        "import normfree.nn.layers, normfree.models, normfree.optim, normfree.data.loader;"
        "bad = {'tyro', 'rich', 'matplotlib', 'torchvision', 'mlxtend'} & set(sys.modules); assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_house_of_the_design_is_the_house() -> None:
    """Every module of the package has its place in docs/design.md."""
    design = (ROOT / "docs" / "design.md").read_text().split("## Three decisions")[0]
    for path in (ROOT / "src" / "normfree").iterdir():
        if path.name.startswith(("_", "py.typed")) or path.name == "cli":
            continue
        assert re.search(rf"\b{path.stem}\b", design), path.name


def test_the_version_is_written_once() -> None:
    """pyproject.toml and the package agree."""
    assert f'version = "{normfree.__version__}"' in (ROOT / "pyproject.toml").read_text()
