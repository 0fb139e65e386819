"""What the site takes from elsewhere in the repository, so that nothing is written twice."""

from pathlib import Path
import re
import tomllib

ROOT = Path(__file__).resolve().parents[1]
TABLE = re.compile(r"<!-- table of (\S+): (\w+) -->")
SECTION = re.compile(r"<!-- section of (\S+): (.+?) -->")


def table(found: re.Match) -> str:
  """What stands between a table's markers."""
  file, name = found.groups()
  return between(file, rf"<!-- table: {name} -->\n(.*?)<!-- end -->")


def section(found: re.Match) -> str:
  """What stands under a heading of the second level."""
  file, heading = found.groups()
  return between(file, rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)").replace("](docs/", "](")


def between(file: str, pattern: str) -> str:
  found = re.search(pattern, (ROOT / file).read_text(), re.DOTALL | re.MULTILINE)
  if found is None:
    raise LookupError(f"{file} has nothing that matches {pattern!r}; write the page's marker as the file has it.")
  return found[1].strip()


def on_page_markdown(markdown: str, **_) -> str:
  """Puts tables and sections in the places of their markers."""
  return SECTION.sub(section, TABLE.sub(table, markdown))


def on_config(config):
  """Links the repository, where the project's metadata names one."""
  address = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
  if "/OWNER/" not in address:
    config.repo_url = address
  return config


def on_files(files, config):
  """Adds the recorded plots."""
  from mkdocs.structure.files import File

  for name in ("memory", "train_step"):
    plot = ROOT / f"benchmarks/results/{name}/{name}.png"
    files.append(File.generated(config, f"img/{name}.png", abs_src_path=str(plot)))
  return files
