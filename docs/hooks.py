"""Hook of mkdocs: TeX becomes MathML when the site is built, so that pages show mathematics without any script."""

import html
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

TEX = re.compile(r'<(span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, page, **_) -> str:
    """The page's HTML with what `pymdownx.arithmatex` marked as TeX converted."""

    def to_mathml(match: re.Match) -> str:
        display = "block" if match["open"] == "[" else "inline"
        try:
            return convert(html.unescape(match["tex"]), display=display)
        except Exception as error:  # the converter has no common class of errors
            raise PluginError(f"{page.file.src_path}: cannot convert {match['tex']!r}: {error!r}") from error

    return TEX.sub(to_mathml, content)
