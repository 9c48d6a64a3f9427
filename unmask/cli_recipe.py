"""`unmask recipe`: the recipes that come with unmask."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from typer import Argument

from unmask.cli_complete import complete_recipe

app = typer.Typer(no_args_is_help=True, help="List and show the recipes that come with unmask.")


@app.command("list")
def list_recipes() -> None:
    """List the recipes; `unmask train NAME` runs one."""
    from unmask.shipped import purpose, recipe_text, shipped_recipes

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name in shipped_recipes():
        table.add_row(name, purpose(recipe_text(name)))
    Console(highlight=False, markup=False).print(table)


@app.command()
def show(
    name: Annotated[
        str, Argument(metavar="NAME", help="Recipe of `unmask recipe list`.", autocompletion=complete_recipe)
    ],
) -> None:
    """Print a recipe, to read or to edit: unmask recipe show NAME > my.yaml."""
    from unmask.shipped import recipe_text

    sys.stdout.write(recipe_text(name))
