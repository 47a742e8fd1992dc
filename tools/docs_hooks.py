"""mkdocs hooks: pages made of files that lie outside of docs/, and the command line's help as a page.

`csrc/README.md` and the READMEs beside the kernels become `kernels/*.md`; links to them from docs/ are followed there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_TO_CSRC = re.compile(r"\]\((?:\.\./)+csrc/(?:(?P<op>\w+)/)?README\.md\)")
_ELSEWHERE = re.compile(r"\[(?P<text>[^\]]+)\]\((?:\.\./)+(?!csrc/)(?P<path>[^)#]+)(?:#[^)]*)?\)")


def _readmes() -> dict[str, Path]:
    """Page names under kernels/ and the files behind them."""
    pages = {"index.md": ROOT / "csrc" / "README.md"}
    return pages | {f"{path.parent.name}.md": path for path in sorted((ROOT / "csrc").glob("*/README.md"))}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    from mkdocs.structure.files import File

    for name, path in _readmes().items():
        files.append(File.generated(config, f"kernels/{name}", content=path.read_text(encoding="utf-8")))
    files.append(File.generated(config, "api/command-line.md", content=_command_line()))
    return files


def on_config(config: Any) -> Any:
    """List the kernels' and the decisions' pages in the navigation."""
    decisions = sorted(
        (ROOT / "docs" / "decisions").glob("*.md"), key=lambda path: (path.name != "README.md", path.name)
    )
    for entry in config.nav:
        if "Kernels" in entry:
            entry["Kernels"] = [f"kernels/{name}" for name in _readmes()]
        for item in entry.get("Design", ()):
            if isinstance(item, dict) and "Decisions" in item:
                item["Decisions"] = [f"decisions/{path.name}" for path in decisions]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make links to READMEs of csrc links to their pages; other files of the tree are named, not linked."""
    depth = "../" * page.file.src_uri.count("/")
    if page.file.src_uri.startswith("kernels/"):
        markdown = re.sub(r"\]\((?:\.\./)?(\w+)/README\.md\)", r"](\1.md)", markdown)

    def to_kernels(match: re.Match[str]) -> str:
        return f"]({depth}kernels/{match['op'] or 'index'}.md)"

    def named(match: re.Match[str]) -> str:
        inside = (Path(page.file.src_uri).parent / match[0].rpartition("(")[2].rstrip(")").partition("#")[0]).as_posix()
        levels = 0
        for part in Path(inside).parts:
            levels += -1 if part == ".." else 1
            if levels < 0:  # out of docs/
                return f"{match['text']} (`{match['path']}`)"
        return match[0]

    return _ELSEWHERE.sub(named, _TO_CSRC.sub(to_kernels, markdown))


def _command_line() -> str:
    """`pylora --help` and the help of every command."""
    from typer.main import get_command

    from pylora.cli.app import build_app

    app: Any = get_command(build_app())
    pages = ["# Command line\n\nEvery command answers `--help` with this text.\n"]
    for name, each in sorted(app.commands.items()):
        pages.append(f"\n## pylora {name}\n\n{(each.help or '').strip()}\n\n| argument | meaning |\n| --- | --- |\n")
        for parameter in each.params:
            names = (
                ", ".join(f"`{option}`" for option in parameter.opts) if parameter.param_type_name == "option" else ""
            )
            label = names or f"`{parameter.metavar or parameter.name.upper()}`"
            choices = getattr(getattr(parameter, "type", None), "choices", None)
            text = (getattr(parameter, "help", None) or "").replace("|", "\\|")
            if choices:
                text += f" One of {', '.join(str(getattr(c, 'value', c)) for c in choices)}."
            pages.append(f"| {label} | {text} |\n")
    return "".join(pages)
