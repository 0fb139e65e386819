"""Checks the built site: every link within it has a page, and every anchor a place on that page.

Example:
  python -m mkdocs build --strict --site-dir site && python docs/links.py site
"""

from html.parser import HTMLParser
from pathlib import Path
import sys
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
  """The links of a page, and the anchors that it has."""

  def __init__(self, text: str):
    super().__init__()
    self.links: list[str] = []
    self.anchors: set[str] = set()
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    """Collects what a tag names and what it is called."""
    found = dict(attributes)
    self.links += [found[name] for name in ("href", "src") if found.get(name)]
    self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}


def broken(site: Path) -> list[str]:
  """What leads nowhere, as `page: link`."""
  pages = {file.resolve(): Page(file.read_text()) for file in site.rglob("*.html")}
  wrong = []
  for file, page in pages.items():
    if file.name == "404.html":  # its links are from the root of the host
      continue
    for link in page.links:
      parts = urlsplit(link)
      if parts.scheme or parts.netloc:
        continue
      target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
      target = target / "index.html" if target.is_dir() else target
      there = target.exists() and (
        not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].anchors
      )
      if not there:
        wrong.append(f"{file.relative_to(site.resolve())}: {link}")
  return wrong


if __name__ == "__main__":
  found = broken(Path(sys.argv[1]))
  print("\n".join(found), file=sys.stderr)
  sys.exit(bool(found))
