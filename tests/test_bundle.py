"""`raysweep eval --bundle`, `--sign` and `--verify`: what a bundle shows, and false claims.

The forgeries are those of `benchmarks/forged_bundles.py`, which prints them as a table.
"""

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from raysweep.attacks import AttackCascade, Norm, build_named_attack
from raysweep.cli import main
from raysweep.robustness_bundle import compute_robust_interval, verify_bundle

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import forged_bundles

SMALL = ["--set", "epochs=2", "--set", "data.val_size=50", "--set", "*.attacks.*.steps=2"]
SMALL += ["--set", "validation.finish.*.steps=2", "--set", "validation.finish.*.runs=1"]
N_EXAMPLES = 40
NEEDS_SSH = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="needs OpenSSH")


@pytest.fixture(scope="module")
def bundle(one_core, tmp_path_factory) -> Path:
    """A bundle of the first 40 test images of digits."""
    out = tmp_path_factory.mktemp("bundle")
    assert main(["train", "at", *SMALL, "--name", "mine", "--out", str(out)]) == 0
    command = ["eval", str(out / "runs" / "mine"), "--attack", "apgd-ce", "--n", str(N_EXAMPLES)]
    command += ["--set", "subset=first", "--out", str(out), "--bundle", str(out / "claim")]
    assert main(command) == 0
    assert main(command) == 2, "it is not overwritten"
    return out / "claim"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, with a key in ~/.ssh."""
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    key = tmp_path / "home" / ".ssh" / "key"
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(key)]
    subprocess.run(command, check=True)
    return tmp_path / "home"


@pytest.fixture
def short_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attack of AutoAttack takes a twentieth of the time of all."""

    def build(eps: float, norm: Norm) -> AttackCascade:
        return build_named_attack("apgd-ce", eps, norm)

    monkeypatch.setattr("raysweep.robustness_bundle.fresh_attack.autoattack", build)


def count_confirmed(folder: Path) -> int:
    """Count broken rows by the stored arrays alone, which the honest bundle has right."""
    with np.load(folder / "adversarial.npz") as arrays:
        return int((~arrays["robust"]).sum())


def test_an_honest_bundle_shows_an_upper_bound(bundle: Path, capsys) -> None:
    names = {path.name for path in bundle.iterdir()}
    assert names == {"card.json", "adversarial.npz", "manifest.json", "checkpoint"}
    assert main(["eval", "--verify", str(bundle)]) == 0
    n_broken = count_confirmed(bundle)
    first, *others = capsys.readouterr().out.splitlines()
    assert first == (
        f"{bundle}: robust at most {1 - n_broken / N_EXAMPLES:.2%} of these {N_EXAMPLES}, the "
        f"first of 450 of the data 'digits'; {n_broken} confirmed broken at Linf 0.15"
    )
    assert f"  of all 450 robust at most {1 - n_broken / 450:.2%}" in others
    assert any("not shown: that the others are robust" in line for line in others)
    assert "  not signed: nothing shows who made it" in others
    assert not any("sound" in line for line in others)


def test_the_same_as_json(bundle: Path, capsys) -> None:
    assert main(["eval", "--verify", str(bundle), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["problems"] == [] and shown["card"]["examples"] == N_EXAMPLES
    assert shown["confirmed_broken"] == count_confirmed(bundle)
    assert (shown["examples"], shown["test_examples"], shown["subset"]) == (40, 450, "first")
    assert shown["unchecked"] == ["name", "attacks", "unreliable", "number_forward_passes"]
    assert "sound" not in shown and shown["fresh_attack"] is None


def test_the_manifest_names_files_data_code_and_versions(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    files = [path for path in bundle.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert manifest["files"] == {
        path.relative_to(bundle).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    meta = json.loads((bundle / "checkpoint" / "meta.json").read_text())
    assert manifest["data"]["fingerprint"] == meta["data_fingerprint"]
    assert manifest["data"]["test_examples"] == 450
    assert manifest["code_revision"] == meta["environment"]["git_revision"]
    assert manifest["versions"]["torch"] == meta["environment"]["torch"]


@pytest.mark.parametrize("name", forged_bundles.FORGERIES)
def test_a_forged_bundle_is_caught_or_bounded(name, bundle: Path, tmp_path: Path, capsys) -> None:
    forgery = forged_bundles.FORGERIES[name]
    forged_bundles.forge_bundle(bundle, tmp_path / "forged", forgery)
    code = main(["eval", "--verify", str(tmp_path / "forged")])
    out, err = capsys.readouterr()
    assert (code, forgery.words in out + err) == (forgery.exit_code, True), out + err
    assert "Traceback" not in err
    assert all(character.isprintable() or character == "\n" for character in out + err)
    if code == 0:
        # What is printed is true: no more is claimed than the honest bundle and its data allow.
        assert out.startswith(f"{tmp_path / 'forged'}: robust at most ")
        assert out.count("robust at most") == 2 + (name == "a field that prints a result")


def test_clean_images_in_place_of_adversarial_ones_are_bounded_and_then_caught(
    bundle: Path, short_attack: None, tmp_path: Path, capsys
) -> None:
    """The bound is what the model does to clean images; a fresh attack shows the rest."""
    forgery = forged_bundles.FORGERIES["adversarial examples replaced by clean images"]
    forged_bundles.forge_bundle(bundle, tmp_path / "forged", forgery)
    shown = verify_bundle(tmp_path / "forged")
    assert shown.problems == [] and shown.n_broken == shown.n_misclassified
    assert shown.upper_bound == shown.clean_accuracy
    command = ["eval", "--verify", str(tmp_path / "forged"), "--attack", "12", "--set", "seed=5"]
    assert main(command) == 1
    out, err = capsys.readouterr()
    (line,) = [line for line in out.splitlines() if "AutoAttack breaks" in line]
    assert f"of 12 drawn from the {N_EXAMPLES - shown.n_broken} others (seed 5)" in line
    assert "false claim" not in err, "a weak attack in good faith would look the same"
    assert re.search(r": \d+ of 12 of the claimed robust rows fell to a stronger attack, Auto", err)
    assert "(seed 5); the card says " in err and err.rstrip().endswith("under apgd-ce")


def test_a_fresh_attack_on_an_honest_bundle(bundle: Path, short_attack: None) -> None:
    """An attack on all that are left gives a number, an attack on some of them an interval."""
    before = verify_bundle(bundle)
    whole = verify_bundle(bundle, n_attacked=1000, seed=3)
    assert whole.fresh_attack is not None and whole.robust_interval is not None
    assert whole.fresh_attack.n_attacked == whole.fresh_attack.n_left == 40 - before.n_broken
    assert whole.robust_interval == pytest.approx((whole.upper_bound, whole.upper_bound))
    assert whole.summary()["fresh_attack"] == vars(whole.fresh_attack)
    part = verify_bundle(bundle, n_attacked=4, seed=3)
    assert part.fresh_attack is not None and part.robust_interval is not None
    assert part.robust_interval[0] <= whole.upper_bound <= part.robust_interval[1]
    assert part.robust_interval[1] <= before.upper_bound


def test_the_verifier_draws_the_sample(bundle: Path, short_attack: None) -> None:
    results = [verify_bundle(bundle, n_attacked=1).fresh_attack for _ in range(2)]
    assert results[0] is not None and results[1] is not None
    assert results[0].seed != results[1].seed, "whoever makes a bundle cannot know the seed"


def probability(n_left: int, n_bad: int, n_drawn: int, n_found: int) -> float:
    """How likely it is that n_drawn of n_left, of which n_bad are bad, hold n_found bad ones."""
    draws = list(combinations(range(n_left), n_drawn))
    return sum(sum(i < n_bad for i in draw) == n_found for draw in draws) / len(draws)


@pytest.mark.parametrize(("n_found", "n_drawn", "n_left"), [(0, 3, 8), (1, 4, 9), (4, 4, 9)])
def test_the_interval_by_counting_all_draws(n_found: int, n_drawn: int, n_left: int) -> None:
    possible = []
    for n_bad in range(n_left + 1):
        chances = [probability(n_left, n_bad, n_drawn, k) for k in range(n_drawn + 1)]
        if min(sum(chances[: n_found + 1]), sum(chances[n_found:])) > 0.025:
            possible.append(n_bad)
    low, high = compute_robust_interval(n_found, n_drawn, n_left)
    assert (low, high) == (n_left - max(possible), n_left - min(possible))


def test_the_interval_of_a_large_test_set_is_that_of_clopper_and_pearson() -> None:
    for n_found in (0, 3, 20):
        exact = binomtest(n_found, 20).proportion_ci(0.95, method="exact")
        low, high = compute_robust_interval(n_found, 20, 10**6)
        assert 1 - high / 10**6 == pytest.approx(exact.low, abs=2e-5)
        assert 1 - low / 10**6 == pytest.approx(exact.high, abs=2e-5)


def test_the_interval_after_all_were_attacked() -> None:
    assert compute_robust_interval(7, 20, 20) == (13, 13)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--attack", "apgd-ce"], "--verify --attack apgd-ce: give the number of examples"),
        (["--attack", "0"], "--verify --attack 0: give the number of examples"),
        (["--set", "seed=1"], "only --attack N has a setting, its seed"),
        (["--attack", "3", "--set", "seed=x"], "--set seed=x: give a whole number"),
        (["--sign", "key"], "--verify: leave out --sign"),
    ],
)
def test_wrong_arguments_of_a_verification(arguments, words, bundle: Path, capsys) -> None:
    assert main(["eval", str(bundle), "--verify", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_what_is_no_bundle_is_one_line(bundle: Path, tmp_path: Path, capsys) -> None:
    assert main(["eval", "--verify", str(tmp_path / "missing")]) == 2
    assert main(["eval", "--verify", str(tmp_path)]) == 2
    copy = shutil.copytree(bundle, tmp_path / "copy")
    whole = (bundle / "adversarial.npz").read_bytes()
    for content in (b"half", whole[:-99]):
        (copy / "adversarial.npz").write_bytes(content)
        assert main(["eval", "--verify", str(copy)]) == 4
    (copy / "adversarial.npz").write_bytes(whole)
    (copy / "checkpoint" / "weights.safetensors").write_bytes(b"half")
    assert main(["eval", "--verify", str(copy)]) == 4
    (copy / "checkpoint" / "weights.safetensors").unlink()
    assert main(["eval", "--verify", str(copy)]) == 4
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 6 and all("not a bundle" in lines[i] for i in (0, 1, 5))
    assert "adversarial.npz" in lines[2] and "truncated" in lines[4]


def sign(folder: Path, key: Path, namespace: str = "raysweep-bundle") -> None:
    """Sign the manifest of a bundle by the program alone."""
    (folder / "manifest.json.sig").unlink(missing_ok=True)
    command = ["ssh-keygen", "-q", "-Y", "sign", "-f", str(key), "-n", namespace]
    subprocess.run([*command, str(folder / "manifest.json")], check=True, capture_output=True)


def write_allowed(home: Path, line: str) -> str:
    """Write `line` and the key into ~/.ssh/allowed_signers; return the key's fingerprint."""
    public = " ".join((home / ".ssh" / "key.pub").read_text().split()[:2])
    (home / ".ssh" / "allowed_signers").write_text(f"{line} {public}\n")
    command = ["ssh-keygen", "-l", "-f", str(home / ".ssh" / "key")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[1]


@NEEDS_SSH
def test_a_signed_bundle_says_who_made_it(bundle: Path, home: Path, capsys) -> None:
    run, folder = bundle.parent / "runs" / "mine", home / "signed"
    command = ["eval", str(run), "--attack", "apgd-ce", "--n", str(N_EXAMPLES)]
    command += ["--set", "subset=first", "--out", str(bundle.parent), "--bundle", str(folder)]
    assert main([*command, "--sign", str(home / ".ssh" / "key")]) == 0
    capsys.readouterr()
    fingerprint = write_allowed(home, "ada@example.org")
    assert main(["eval", "--verify", str(folder)]) == 0
    assert f"  signed by ada@example.org, key ED25519 {fingerprint}\n" in capsys.readouterr().out
    for line in (
        "bob@example.org cert-authority",
        'ada@example.org namespaces="git"',
        'ada@example.org valid-before="20200101"',
        "# nobody",
    ):
        write_allowed(home, line)
        assert main(["eval", "--verify", str(folder)]) == 0
        assert "which ~/.ssh/allowed_signers does not name" in capsys.readouterr().out
    (home / ".ssh" / "allowed_signers").unlink()
    shown = verify_bundle(folder)
    assert shown.signature.key == f"ED25519 {fingerprint}" and shown.signature.signer is None


@NEEDS_SSH
def test_a_signature_of_something_else_is_false(bundle: Path, home: Path) -> None:
    key = home / ".ssh" / "key"
    write_allowed(home, "ada@example.org")
    copy = shutil.copytree(bundle, home / "copy")
    sign(copy, key)
    assert verify_bundle(copy).signature.signer == "ada@example.org"
    sign(copy, key, namespace="git")
    (problem,) = verify_bundle(copy).problems
    assert problem == "manifest.json.sig is not a signature of manifest.json"
    sign(copy, key)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"code_revision": "other"}))
    assert verify_bundle(copy).problems == [problem]
    (copy / "manifest.json").unlink()
    assert verify_bundle(copy).problems == [problem], "a signature of nothing"


@NEEDS_SSH
def test_a_signed_manifest_does_not_vouch_for_other_files(bundle: Path, home: Path) -> None:
    copy = shutil.copytree(bundle, home / "copy")
    sign(copy, home / ".ssh" / "key")
    with forged_bundles.edit_json(copy / "card.json") as card:
        card["authors"] = "someone else"
    shown = verify_bundle(copy)
    assert shown.problems == ["'card.json' was changed since manifest.json was written"]


@NEEDS_SSH
def test_keys_that_cannot_sign_are_one_line_before_anything_runs(
    bundle: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run, folder = bundle.parent / "runs" / "mine", home / "signed"
    command = ["eval", str(run), "--attack", "apgd-ce", "--out", str(bundle.parent)]
    (home / "text").write_text("no key")
    for arguments, words, code in (
        (["--sign", "key"], "--sign: signs a bundle; give --bundle DIR too", 2),
        (["--bundle", str(folder), "--sign", "absent"], "--sign absent: no such file", 2),
        (["--bundle", str(folder), "--sign", str(home / "text")], "not an SSH key", 2),
    ):
        assert main([*command, *arguments]) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line and not folder.exists()
    monkeypatch.setenv("PATH", str(home))
    assert main([*command, "--bundle", str(folder), "--sign", str(home / ".ssh" / "key")]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("ssh-keygen is not installed (it is a part of OpenSSH)")


@NEEDS_SSH
def test_without_openssh_a_signature_is_not_checked_and_that_is_said(
    bundle: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    copy = shutil.copytree(bundle, home / "copy")
    sign(copy, home / ".ssh" / "key")
    monkeypatch.setenv("PATH", str(home))
    assert main(["eval", "--verify", str(copy)]) == 0
    said = "  the signature was not checked: ssh-keygen is not installed (it is a part of OpenSSH)"
    assert said in capsys.readouterr().out.splitlines()


def test_a_subset_that_raysweep_chooses_is_named(bundle: Path, tmp_path: Path) -> None:
    """Equally many of each class, in any order; other choices are selections."""
    from raysweep.data import choose_subset_rows, load_data
    from raysweep.robustness_bundle.evidence import find_subset
    from raysweep.robustness_bundle.loading import load_bundle
    from raysweep.training.checkpoint import read_checkpoint

    loaded = load_bundle(bundle, None)
    test = load_data(read_checkpoint(bundle / "checkpoint").config.data).test
    for choice in ("balanced", "proportional", "first"):
        rows = choose_subset_rows(test.y, 33, choice).flip(0)
        assert find_subset(_with_rows(loaded, rows)) == choice
    assert find_subset(_with_rows(loaded, rows + 1)) is None
    everything = choose_subset_rows(test.y, 450, "first")
    assert find_subset(_with_rows(loaded, everything)) == "all"
    assert math.isclose(verify_bundle(bundle).test_upper_bound, 1 - count_confirmed(bundle) / 450)


def _with_rows(loaded, rows):
    return replace(loaded, rows=rows)
