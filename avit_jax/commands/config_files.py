"""Config files: those that ship with the package, and a user's own."""

import ast
import importlib.util
import sys
import types
from pathlib import Path

from ml_collections import ConfigDict

from avit_jax.runtime.hints import nearest

DEFAULT_CONFIG = "mnist_avit"
_PACKAGE = Path(__file__).parents[1]
# A wheel has the configs inside the package, a checkout has them beside it.
SHIPPED = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


def load_config(spec: str) -> ConfigDict:
    """The config that --config=SPEC names: "mnist_avit", "folder:avit,/data/pictures", or "my_config.py".

    Raises ValueError if there is no such file, or if the file itself fails.
    """
    file, argument = find_config(spec)
    module_spec = importlib.util.spec_from_file_location("experiment_config", file)
    try:
        if module_spec is None or module_spec.loader is None:
            raise ImportError("it is not a Python file")
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        return module.get_config(*argument)
    except Exception as error:  # whatever the user's own file raises
        message = " ".join(str(error).split())
        # A ValueError is a message to the user about the argument; other errors are the file's own faults.
        kind = "" if isinstance(error, ValueError) else f" fails with {type(error).__name__}"
        raise ValueError(f"the config file {str(file)!r}{kind}: {message}") from error


def find_config(spec: str) -> tuple[Path, list[str]]:
    """The file that --config=SPEC names, and the text after its colon, if there is one.

    A file at that path comes first, then the shipped config of that name (configs/NAME.py, NAME.py or NAME). Raises
    ValueError, naming the nearest config, if there is neither.
    """
    name, colon, argument = spec.partition(":")
    _use_shipped_configs()
    shipped = SHIPPED / Path(name).name
    nearby = Path("configs", name)
    for file in (Path(name), nearby, nearby.with_suffix(".py"), shipped, shipped.with_suffix(".py")):
        if file.suffix == ".py" and file.is_file():
            return file, [argument] if colon else []
    if Path(name).is_file():
        raise ValueError(f"the config {name!r} is not a Python file: its name must end in .py")
    known = shipped_configs()
    in_words = {f"configs/{known_name}.py": known_name for known_name in known}
    raise ValueError(f"there is no config file {name!r}: {nearest(name, in_words if '/' in name else known)}")


def shipped_configs() -> dict[str, str]:
    """The name of every shipped config, with the first line of its file."""
    found = {}
    for file in sorted(SHIPPED.glob("[a-z]*.py")):
        documentation = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        found[file.stem] = documentation.partition("\n")[0]
    return found


def _use_shipped_configs() -> None:
    """Make `from configs import mnist_dense` work in a config file, wherever the command runs.

    The folder configs/ where the command runs comes first, so that a user's copy of a shipped file is used.
    """
    package = sys.modules.get("configs")
    if package is None:
        package = sys.modules["configs"] = types.ModuleType("configs")
        package.__path__ = []
    own = Path("configs").absolute()
    folders = [str(folder) for folder in (own, SHIPPED) if folder.is_dir()]
    package.__path__ = list(dict.fromkeys([*package.__path__, *folders]))
