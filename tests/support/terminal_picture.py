"""A picture of the terminal as SVG, and the text in such a picture.

In: what a command printed, with its colors. Out: the SVG, which loads no font and no other file.
"""

import io
import re
from xml.etree import ElementTree as ET

from rich.console import Console
from rich.text import Text

COLUMNS = 80


def drawn(printed: str, title: str) -> str:
    """The SVG of a terminal that shows `printed`."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), color_system="truecolor", force_terminal=True)
    for line in printed.splitlines():
        console.print(Text.from_ansi(line), overflow="fold")
    svg = console.export_svg(title=title, unique_id="terminal")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


def drawn_demo(printed: str) -> str:
    """The picture of `merge-gate demo` in the documents."""
    return drawn(f"$ merge-gate demo\n{printed}", "merge-gate demo")


def text_of(svg: str) -> str:
    """What the terminal in an SVG of `drawn` shows, without blanks."""
    elements = ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    shown = [element.text or "" for element in elements if "#terminal-line-" in element.get("clip-path", "")]
    return "".join("".join(shown).split())


def plain(printed: str) -> str:
    """What a command printed, without its colors."""
    return "\n".join(Text.from_ansi(line).plain for line in printed.splitlines())
