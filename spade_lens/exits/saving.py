"""Exit tables from disk, where :meth:`ExitTable.save` has put them.

They need no model: what is simulated on a table is simulated on what was saved.
"""

from os import PathLike
from pathlib import Path

from spade_lens.exits.ledger import Prices
from spade_lens.exits.table import ExitTable
from spade_lens.lenses.saving_files import read_json, read_tensors

_KIND = ("exit table", 1)


def load_table(folder: str | PathLike[str]) -> ExitTable:
    """A table that ``table.save(folder)`` wrote, equal to it in every field.

    Example:
        >>> table = load_table("tables/antonym")  # doctest: +SKIP

    Args:
        folder: The folder with ``table.json`` and ``table.safetensors``.

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If the files are damaged, do not belong together or are of a kind that is not
            known here.
    """
    place = Path(folder).expanduser()
    content = read_json(place / "table.json")
    if (content.get("kind"), content.get("format")) != _KIND:
        raise ValueError(
            f"{place / 'table.json'} describes a {content.get('kind')!r}, format "
            f"{content.get('format')!r}; expected {_KIND[0]!r}, format {_KIND[1]}. It may be from "
            "a newer version of spade_lens."
        )
    plain = ("model", "lens", "spade", "layers", "n_layers", "stops", "shared", "tensors_sha256")
    absent = [key for key in plain if key not in content]
    if absent:
        raise ValueError(f"{place / 'table.json'} lacks {absent}; make and save the table again.")
    path = place / "table.safetensors"
    tensors = read_tensors(
        path, content["tensors_sha256"], of="table", again="make and save the table"
    )
    own = {n: t for n, t in tensors.items() if not n.startswith("prices.")}
    priced = {n.removeprefix("prices."): t for n, t in tensors.items() if n.startswith("prices.")}
    return ExitTable(
        model=content["model"],
        lens=content["lens"],
        spade=content["spade"],
        layers=tuple(content["layers"]),
        n_layers=content["n_layers"],
        prices=Prices(stops=tuple(content["stops"]), shared=content["shared"], **priced),
        **own,
    )
