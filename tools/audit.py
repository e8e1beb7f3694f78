"""Licences and known vulnerabilities of everything that bevqat is installed with: `make audit`.

example:
  python tools/audit.py                     # this environment
  python tools/audit.py --extra dev gpu     # with what the extras [dev] and [gpu] bring
  python tools/audit.py --path DIR          # another site-packages

Three things are looked at: the licence of each package that bevqat needs, directly or through another one (read from the
packages' own metadata); whether the installed version is among those of tools/advisories.json; and, where pip-audit is
installed and reaches its database, what that says. Exit status 1 where anything is found.

tools/advisories.json is a reviewed list of advisories about packages that are in bevqat's dependencies, as of the date in it.
It works without a network, and it knows nothing newer than its date and nothing of packages that it does not name: it keeps known
bad versions out of an offline environment and replaces no vulnerability database.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import operator
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ADVISORIES = Path(__file__).with_name("advisories.json")

# SPDX identifiers that let the package be used, changed and shipped with a notice.
PERMISSIVE = {
    "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "HPND", "ISC", "MIT", "MIT-0", "MIT-CMU", "PSF-2.0",
    "Python-2.0", "Unlicense", "Zlib",
}  # fmt: skip

# What packages without an SPDX expression write, in their classifiers or in the field License.
WRITTEN = {
    "apache software license": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache-2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "osi approved :: apache software license": "Apache-2.0",
    "bsd license": "BSD-3-Clause",
    "bsd": "BSD-3-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "bsd 3-clause": "BSD-3-Clause",
    "bsd 3-clause license": "BSD-3-Clause",
    "3-clause bsd license": "BSD-3-Clause",
    "new bsd": "BSD-3-Clause",
    "freebsd": "BSD-2-Clause",
    "isc license (iscl)": "ISC",
    "mit license": "MIT",
    "mit": "MIT",
    "python software foundation license": "PSF-2.0",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "gnu general public license v2 (gplv2)": "GPL-2.0-only",
    "gnu general public license v3 (gplv3)": "GPL-3.0-only",
    "gnu lesser general public license v3 (lgplv3)": "LGPL-3.0-only",
    "gnu affero general public license v3": "AGPL-3.0-only",
}

# Where the metadata say nothing that can be read: what the package's own licence file says.
READ_BY_HAND = {
    "embreex": "BSD-2-Clause",  # its field License is the licence's text
    "nuscenes-devkit": "Apache-2.0",  # its LICENSE.txt; the classifier "Free for non-commercial use" is about the data set
}

# Not permissive, looked at, and kept: name → (licence, why it does no harm).
REVIEWED = {
    "hypothesis": ("MPL-2.0", "for tests alone; not shipped. MPL-2.0 asks for changes to its own files only"),
    "pathspec": ("MPL-2.0", "of mypy, for development alone; not shipped"),
    "shtab": ("MPL-2.0", "used unchanged, as a library; MPL-2.0 asks for changes to its own files only"),
    "tqdm": ("MPL-2.0 AND MIT", "used unchanged, as a library; MPL-2.0 asks for changes to its own files only"),
}
NOT_CODE_OF_OURS = ("nvidia-",)  # CUDA's libraries, under NVIDIA's own terms: the extra [gpu] names them


@dataclass
class Package:
    """An installed package. licence: an SPDX expression, or "" where none is known. needed_by: one that requires it."""

    name: str
    version: str
    licence: str
    needed_by: str
    problems: list[str] = field(default_factory=list)


def installed(path: Path | None = None) -> dict[str, importlib.metadata.Distribution]:
    """Distributions by canonical name; of another site-packages where one is given."""
    found = importlib.metadata.distributions(path=[str(path)]) if path else importlib.metadata.distributions()
    return {canonicalize_name(d.metadata["Name"]): d for d in found if d.metadata["Name"]}


def closure(
    distributions: dict[str, importlib.metadata.Distribution], root: str, extras: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """{package: one that needs it} of all that `root` needs, itself not counted, and the needed ones that are not there."""
    environment = dict(default_environment())
    waiting = [(root, extra) for extra in ("", *extras)]
    seen, found, missing = set(waiting), {}, []
    while waiting:
        name, extra = waiting.pop()
        for text in distributions[name].requires or ():
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                continue
            if requirement.marker and not requirement.marker.evaluate({**environment, "extra": extra}):
                continue
            needed = canonicalize_name(requirement.name)
            if needed not in distributions:
                missing.append(f"{needed} (of {name})")
                continue
            found.setdefault(needed, name)
            for inner in ("", *requirement.extras):
                if (needed, inner) not in seen:
                    seen.add((needed, inner))
                    waiting.append((needed, inner))
    return dict(sorted(found.items())), sorted(set(missing))


def licence_of(distribution: importlib.metadata.Distribution) -> str:
    """An SPDX expression of a package's licence; "" where its metadata say nothing that is understood."""
    metadata = distribution.metadata
    name = canonicalize_name(metadata["Name"])
    if name in READ_BY_HAND:
        return READ_BY_HAND[name]
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classified = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier") or () if c.startswith("License ::")]
    known = [WRITTEN.get(text.lower(), "") for text in classified if text != "OSI Approved"]
    if known and all(known):
        return " AND ".join(dict.fromkeys(known))
    lines = str(metadata.get("License") or "").strip().splitlines()
    if len(lines) == 1:  # more are the text of a licence
        text = lines[0].strip()
        return WRITTEN.get(text.lower()) or (text if is_expression(text) else "")
    return ""


def is_expression(text: str) -> bool:
    """Whether a text is an SPDX expression, as far as its form tells."""
    return re.fullmatch(r"\(?[A-Za-z0-9.+-]+\)?( (AND|OR|WITH) \(?[A-Za-z0-9.+-]+\)?)*", text) is not None


def is_permissive(expression: str) -> bool:
    """Whether an SPDX expression leaves a choice of permissive licences alone."""
    tokens = re.findall(r"\(|\)|[A-Za-z0-9.+-]+", expression)
    at = 0

    def joined(word: str, part: Callable[[], bool], join: Callable[[bool, bool], bool]) -> bool:
        nonlocal at
        value = part()
        while at < len(tokens) and tokens[at] == word:
            at += 1
            value = join(value, part())
        return value

    def either() -> bool:
        return joined("OR", both, operator.or_)

    def both() -> bool:
        return joined("AND", one, operator.and_)

    def one() -> bool:
        nonlocal at
        if at >= len(tokens):
            return False
        token = tokens[at]
        at += 1
        if token == "(":
            value = either()
            at += 1
            return value
        if at < len(tokens) and tokens[at] == "WITH":  # an exception gives more, never less
            at += 2
        return token in PERMISSIVE

    return either() and at == len(tokens)


def read_advisories(path: Path = ADVISORIES) -> tuple[str, list[dict[str, str]]]:
    """The date of the list and its entries: id, package, affected (a version specifier), what, source."""
    value = json.loads(path.read_text(encoding="utf-8"))
    return value["reviewed"], value["advisories"]


def look(
    distributions: dict[str, importlib.metadata.Distribution],
    needed: dict[str, str],
    advisories: Iterable[dict[str, str]],
) -> list[Package]:
    """What is to be said of each package."""
    by_name: dict[str, list[dict[str, str]]] = {}
    for advisory in advisories:
        by_name.setdefault(canonicalize_name(advisory["package"]), []).append(advisory)
    packages = []
    for name, needed_by in needed.items():
        distribution = distributions[name]
        package = Package(name, distribution.version, licence_of(distribution), needed_by)
        reviewed = REVIEWED.get(name)
        if not package.licence and not name.startswith(NOT_CODE_OF_OURS):
            package.problems.append("licence unknown: read its licence file and add it to READ_BY_HAND")
        elif (
            package.licence and not is_permissive(package.licence) and (not reviewed or reviewed[0] != package.licence)
        ):
            package.problems.append(f"licence {package.licence} is not permissive: replace it, or review it (REVIEWED)")
        for advisory in by_name.get(name, ()):
            if SpecifierSet(advisory["affected"]).contains(distribution.version, prereleases=True):
                package.problems.append(f"{advisory['id']}: {advisory['what']} (affected: {advisory['affected']})")
        packages.append(package)
    return packages


def ask_pip_audit(path: Path | None) -> tuple[bool | None, str]:
    """Whether pip-audit found nothing; None where it is not installed or has no database. And what it said."""
    if importlib.util.find_spec("pip_audit") is None:
        return None, "pip-audit is not installed: the reviewed list alone was asked"
    where = ["--path", str(path)] if path else ["--local"]
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", *where]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return understood(done.stdout)


def understood(report: str) -> tuple[bool | None, str]:
    """`ask_pip_audit`'s answer from pip-audit's JSON. Packages that it knows nothing of are skipped in it, and where it reaches no
    database, all are: that is no clean bill."""
    try:
        entries = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return None, "pip-audit reached no database: the reviewed list alone was asked"
    asked = [entry for entry in entries if "vulns" in entry]
    found = [f"{entry['name']} {entry['version']}: {v['id']}" for entry in asked for v in entry["vulns"]]
    if found:
        return False, "pip-audit found " + ", ".join(found)
    if not asked:
        return None, f"pip-audit knew none of {len(entries)} packages: the reviewed list alone was asked"
    return (
        True,
        f"pip-audit: nothing known of {len(asked)} packages ({len(entries) - len(asked)} it could not ask about)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", default="bevqat", help="whose dependencies (default bevqat)")
    parser.add_argument("--extra", nargs="*", default=["dev"], help="with these extras' (default dev)")
    parser.add_argument("--path", type=Path, help="a site-packages; this environment's without it")
    parser.add_argument("--offline", action="store_true", help="do not ask pip-audit")
    args = parser.parse_args(argv)
    distributions = installed(args.path)
    root = canonicalize_name(args.package)
    if root not in distributions:
        print(f"error: {args.package}: not installed here; fix by pip install -e '.[dev]'", file=sys.stderr)
        return 2
    needed, missing = closure(distributions, root, args.extra)
    reviewed, advisories = read_advisories()
    packages = look(distributions, needed, advisories)
    width = max((len(f"{p.name} {p.version}") for p in packages), default=0)
    for package in packages:
        note = f"   reviewed: {REVIEWED[package.name][1]}" if package.name in REVIEWED and not package.problems else ""
        print(f"{f'{package.name} {package.version}':{width}}  {package.licence or 'unknown'}{note}")
    for name in missing:
        print(f"note: {name}: needed and not installed: not looked at")
    problems = [f"{p.name} {p.version} (needed by {p.needed_by}): {text}" for p in packages for text in p.problems]
    clean, said = (None, "pip-audit was not asked") if args.offline else ask_pip_audit(args.path)
    print(f"{len(packages)} packages; {len(advisories)} advisories, reviewed {reviewed}; {said}")
    if clean is False:
        problems.append("pip-audit found vulnerable versions, above")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
