"""What a user installs is a range, so that a torch that is there stays; what tests run on is one version of each."""

from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


def requirements(name):
    """{package: its Requirement} of a file's own lines."""
    lines = (ROOT / name).read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith(("-r", "#"))]
    return {each.name.lower(): each for each in found}


def test_every_package_of_the_ranges_is_pinned_for_the_tests_within_its_range():
    ranges, pins = requirements("requirements.txt"), requirements("requirements-dev.txt")
    assert "-r requirements.txt" in (ROOT / "requirements-dev.txt").read_text()
    for name, wanted in ranges.items():
        (pin,) = pins[name].specifier
        assert pin.operator == "==" and wanted.specifier.contains(pin.version), name


def test_the_ranges_hold_the_versions_of_torch_that_were_run_and_none_that_was_not():
    torch = requirements("requirements.txt")["torch"].specifier
    assert all(torch.contains(version) for version in ("2.11.0", "2.11.0+cu130", "2.13.0", "2.13.0+cpu"))
    assert not any(torch.contains(version) for version in ("2.10.0", "2.13.1", "2.14.0"))
