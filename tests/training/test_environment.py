"""What a run stands on is told apart and written down."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_speech import environment


def _fake_apex(folder: Path, *, nvidia: bool) -> Path:
    package = folder / "apex"
    package.mkdir()
    # Like the web toolkit of 2013, which does not even import under Python 3.
    (package / "__init__.py").write_text("" if nvidia else "raise SyntaxError('print statement')\n")
    for part in ("optimizers", "normalization") if nvidia else ("handlers",):
        (package / part).mkdir()
    return package


@pytest.mark.parametrize("nvidia", [True, False])
def test_nvidias_apex_is_told_from_the_web_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvidia: bool
) -> None:
    package = _fake_apex(tmp_path, nvidia=nvidia)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert environment.apex_kind() == ("nvidia" if nvidia else "foreign", str(package))


@pytest.mark.slow
def test_a_web_toolkit_named_apex_is_named_and_kept_from_megatron_core(tmp_path: Path) -> None:
    package = _fake_apex(tmp_path, nvidia=False)
    script = (
        "import json, sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from megatron_speech import environment\n"
        "environment.prepare_imports()\n"
        "import megatron_speech.model.builder\n"
        "from megatron.core.models import backends\n"
        "found = environment.detect()\n"
        "print(environment.describe(found), file=sys.stderr)\n"
        "print(json.dumps([backends.HAVE_APEX, found]))\n"
    )
    done = subprocess.run([sys.executable, "-W", "error::UserWarning:megatron_speech", "-c", script],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    have_apex, found = json.loads(done.stdout)
    assert not have_apex
    assert (found["nvidia-apex"], found["foreign-apex"]) == (None, str(package))
    assert f"{package} is not NVIDIA apex" in done.stderr and "without" in done.stderr
    assert "UserWarning" not in done.stderr


def test_the_commit_of_a_checkout_is_recorded(repository: Path) -> None:
    state = environment._git_state()
    if not (repository / ".git").exists():
        assert state is None
    else:
        assert state is not None and len(state["commit"]) == 40


@pytest.mark.slow
def test_training_on_a_cpu_imports_no_compiler() -> None:
    code = """
import sys
from megatron_speech.environment import prepare_imports
prepare_imports()
import megatron_speech.training.trainer
assert "torch._dynamo" not in sys.modules and "torch._inductor" not in sys.modules
from megatron.core.jit import jit_fuser
seen = []
def decorator(function):
    seen.append(function)
    return function
from megatron_speech.environment import _compiled_when_called
add = _compiled_when_called(decorator)(lambda a, b: a + b)
assert not seen and add(1, b=2) == 3 and add(3, 4) == 7 and len(seen) == 1
assert jit_fuser.__module__ == "megatron_speech.environment"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
