# SPDX-License-Identifier: Apache-2.0
"""The entry points of pyproject.toml on a path, as an installed wheel has them."""

from __future__ import annotations

import configparser
import pathlib

import tomllib

ROOT = pathlib.Path(__file__).parents[2]


def write(folder: pathlib.Path) -> pathlib.Path:
    """Write a distribution that holds nothing but our entry points, and return its folder."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / "turbokv_entry_points-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: turbokv-entry-points\nVersion: 0\n"
    )
    points = configparser.ConfigParser(delimiters=("=",))
    points.read_dict(project["entry-points"])
    with (info / "entry_points.txt").open("w") as file:
        points.write(file)
    return folder
