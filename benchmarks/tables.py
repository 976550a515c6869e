"""Where a benchmark leaves what it measured."""

import json
import pathlib
from typing import Any


def write(out: str | None, name: str, found: Any, text: str) -> None:
    """Writes NAME.json and NAME.md.

    Args:
      out: the folder, made if it is not there; nothing is written without one.
      name: of both files.
      found: the numbers, as JSON holds them.
      text: the table.
    """
    if not out:
        return
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text + "\n")
