"""Whole runs, sweeps and pages of them, for the recipes and studies: needs the extra `lab`."""

from importlib.util import find_spec

if missing := [name for name in ("jinja2", "matplotlib", "psutil", "rich") if find_spec(name) is None]:
    raise ImportError(f"kl_alliteration.lab needs {', '.join(missing)}: pip install 'kl_alliteration[lab]'")
