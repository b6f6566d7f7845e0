"""Which Python packages are installed, and whether their versions are those that were tested."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from kvheap.doctor.finding import Finding
from kvheap.integrations.vllm.versions import DISTRIBUTIONS as VLLM_DISTRIBUTIONS
from kvheap.integrations.vllm.versions import TESTED as TESTED_VLLM

__all__ = ["Peer", "engine_findings", "package_findings"]

Lookup = Callable[[str], "str | None"]
"""The installed version of a distribution; None if it is not installed."""

REQUIRED = ("numpy", "rich", "sortedcontainers", "torch")

OPTIONAL = (("matplotlib", "pictures of 'kvheap replay', 'calibrate', 'bench' and 'plot'"),)
"""Distribution, and what needs it."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Software that kvheap can be used with, installed by its own instructions.

    Attributes:
        name: what people call it.
        distributions: names under which it may be installed.
        tested: prefixes of the versions that kvheap's tests run against.
        use: what in kvheap meets it.
    """

    name: str
    distributions: tuple[str, ...]
    tested: tuple[str, ...]
    use: str


PEERS = (
    Peer("vLLM", VLLM_DISTRIBUTIONS, TESTED_VLLM, "kvheap.integrations.vllm, its KV cache layouts"),
    Peer("LMCache", ("lmcache",), ("0.5.6",), "kvheap.integrations.lmcache"),
    Peer(
        "Mooncake",
        ("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine"),
        ("0.3.13",),
        "kvheap.integrations.mooncake",
    ),
    Peer("SGLang", ("sglang",), ("0.5.23",), "its KV cache layouts, for store and load"),
)


def installed(distribution: str) -> str | None:
    """The installed version of a distribution; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def package_findings(version_of: Lookup = installed) -> list[Finding]:
    """What kvheap itself imports."""
    found = [Finding("packages", "python", "ok", platform.python_version())]
    found += [_required(name, version_of(name)) for name in REQUIRED]
    found.append(_triton(version_of("triton"), version_of("torch")))
    for name, use in OPTIONAL:
        version = version_of(name)
        if version is None:
            found.append(Finding("packages", name, "absent", use, f"pip install {name}"))
        else:
            found.append(Finding("packages", name, "ok", version))
    return found


def engine_findings(version_of: Lookup = installed) -> list[Finding]:
    """The engines and caches that kvheap has adapters or layouts for."""
    return [_engine(peer, version_of) for peer in PEERS]


def _required(name: str, version: str | None) -> Finding:
    if version is None:
        return Finding("packages", name, "wrong", "not installed", f"pip install {name}")
    return Finding("packages", name, "ok", version)


def _triton(version: str | None, torch_version: str | None) -> Finding:
    """Triton, and whether it is the one that the installed torch was released with."""
    if version is None:
        if platform.system() != "Linux":
            return Finding("packages", "triton", "absent", "has wheels for Linux only")
        remedy = "pip install triton"
        return Finding("packages", "triton", "absent", "needed for copies on a GPU", remedy)
    asked = _triton_of_torch() if torch_version is not None else None
    if asked is not None and not version.startswith(asked):
        return Finding(
            "packages",
            "triton",
            "untested",
            f"{version}, but torch {torch_version} belongs with {asked}",
            f"pip install 'triton=={asked}'",
        )
    return Finding("packages", "triton", "ok", version)


def _triton_of_torch() -> str | None:
    """The version of Triton in torch's requirements; only its builds for CUDA name one."""
    for requirement in metadata.requires("torch") or ():
        named = re.match(r"triton\s*\(?==\s*([0-9.]+)", requirement)
        if named is not None:
            return named[1]
    return None


def _engine(peer: Peer, version_of: Lookup) -> Finding:
    for distribution in peer.distributions:
        version = version_of(distribution)
        if version is None:
            continue
        if any(_is_within(version, tested) for tested in peer.tested):
            return Finding("engines", peer.name, "ok", f"{version}: {peer.use}")
        tested = " and ".join(peer.tested)
        return Finding(
            "engines",
            peer.name,
            "untested",
            f"{version}: {peer.use}",
            f"kvheap's tests run against {tested}",
        )
    tested = " and ".join(peer.tested)
    return Finding("engines", peer.name, "absent", f"{peer.use} (tested with {tested})")


def _is_within(version: str, prefix: str) -> bool:
    """Whether a version is the prefix, or continues it after a dot or a suffix."""
    return re.match(re.escape(prefix) + r"(?![0-9])", version) is not None
