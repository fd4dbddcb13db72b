"""The command line for weights: looks into files, converts them, knows published ones and downloads them."""

from __future__ import annotations

import hashlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from models import pretrained
from models.checkpoints import __main__ as command
from models.checkpoints import load_generator, save_generator, sha256_of
from models.generator import Generator
from models.pretrained import CARDS, find_card, read_cards

ROOT = Path(__file__).resolve().parents[1]
CONTENT = bytes(range(256)) * 40
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any weights: every folder that is searched lies below its path."""
    monkeypatch.setattr(pretrained, "ROOT", tmp_path / "repository")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv(pretrained.VARIABLE, str(tmp_path / "own"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path


def make() -> Generator:
    torch.manual_seed(0)
    generator = Generator(32, channels=(8, 6, 6, 4), z_dim=10, w_dim=12, mapping_layers=3, conv_clamp=256)
    generator.w_avg.normal_()
    return generator


def ours(path: Path, **notes: str) -> Path:
    save_generator(make(), path, notes, torch.float32)
    return path


def foreign(path: Path, without: str = "") -> Path:
    """A file with StyleGAN2-ADA names, which says nothing about itself."""
    torch.save({"G_ema": {name: t for name, t in make().state_dict().items() if name != without}}, path)
    return path


def rows(text: str) -> dict[str, str]:
    return dict(re.findall(r"^  (\S+(?: \S+)*)  +(\S.*)$", text, flags=re.M))


# inspect


def test_inspect_says_what_is_in_the_file(tmp_path: Path, capsys) -> None:
    path = ours(tmp_path / "g.safetensors", name="mine", licence="CC0")
    assert command.main(["inspect", str(path)]) == 0
    found = rows(capsys.readouterr().out)
    parameters = sum(p.numel() for p in make().parameters())
    expected = {"resolution": "32 px", "z, w": "10, 12 wide", "mapping": "3 layers", "styles": "8", "conv_clamp": "256"}
    expected |= {"mean latent": "in the file", "parameters": f"{parameters:,}", "numbers": "float32"}
    expected |= {"sha256": sha256_of(path), "note name": "mine", "note licence": "CC0", "layout": "amortized-pulse"}
    assert expected.items() <= found.items() and found["channels"].startswith("8 6 6 4 ")


def test_inspect_sees_what_is_missing(tmp_path: Path, capsys) -> None:
    assert command.main(["inspect", str(foreign(tmp_path / "g.pt", without="mapping.w_avg"))]) == 0
    found = rows(capsys.readouterr().out)
    assert found["mean latent"].startswith("not in the file") and found["conv_clamp"] == "none"


def test_one_bad_file_never_stops_the_others(tmp_path: Path, capsys) -> None:
    good = foreign(tmp_path / "good.pt")
    broken = foreign(tmp_path / "broken.pt", without="synthesis.b32.torgb.bias")
    noise = tmp_path / "noise.pkl"
    noise.write_bytes(b"nothing of the kind")
    missing = tmp_path / "missing.pt"
    assert command.main(["inspect", str(broken), str(noise), str(missing), str(good)]) == 1
    out, err = capsys.readouterr()
    assert str(good) in out and rows(out)["resolution"] == "32 px"
    assert "synthesis.b32.torgb.bias" in err
    assert all(line.count(str(p)) for line, p in zip(err.splitlines(), (broken, noise, missing), strict=True))


def test_a_note_cannot_forge_a_row_or_steer_the_terminal(tmp_path: Path, capsys) -> None:
    path = ours(tmp_path / "g.safetensors", name="\x1b[2Jmine\n  licence  CC0\u202e" + "x" * 5000)
    assert command.main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "licence" not in rows(out) and rows(out)["note name"].startswith(r"\x1b[2Jmine licence  CC0\u202e")
    assert all(c.isprintable() or c == "\n" for c in out) and max(map(len, out.splitlines())) < 700


def test_what_was_taken_is_said(tmp_path: Path) -> None:
    path = foreign(tmp_path / "g.pt")
    done = subprocess.run(
        [sys.executable, "-m", "models.checkpoints", "inspect", str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr == f"note: {path}: took the averaged weights under 'G_ema'.\n" and done.returncode == 0


# convert


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_convert_keeps_the_pictures(tmp_path: Path, dtype: str, capsys) -> None:
    source, out = foreign(tmp_path / "g.pt"), tmp_path / "new" / "g.safetensors"
    assert command.main(["convert", str(source), str(out), "--dtype", dtype]) == 0
    assert str(out) in capsys.readouterr().out
    before, after = load_generator(source).state_dict(), load_generator(out).state_dict()
    rounded = {name: t.half().float() if dtype == "float16" else t for name, t in before.items()}
    assert all(torch.equal(after[name], t) for name, t in rounded.items()) and after.keys() == before.keys()
    with safe_open(out, framework="pt") as file:
        notes = file.metadata()
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {f"torch.{dtype}"}
    assert {name: notes[name] for name in ("name", "source", "source_sha256", "resolution")} == {
        "name": "g",
        "source": "g.pt",
        "source_sha256": sha256_of(source),
        "resolution": "32",
    }
    assert notes["licence"].startswith("unknown: ")


def test_convert_stores_the_mean_latent_and_the_clamp(tmp_path: Path, capsys) -> None:
    source, out = foreign(tmp_path / "g.pt", without="mapping.w_avg"), tmp_path / "g.safetensors"
    assert command.main(["convert", str(source), str(out)]) == 0
    assert "mean latent: computed" in capsys.readouterr().out
    with safe_open(out, framework="pt") as file:
        assert torch.equal(file.get_tensor("mapping.w_avg"), load_generator(source).w_avg)
    again = tmp_path / "again.safetensors"
    assert command.main(["convert", str(ours(tmp_path / "clamped.safetensors")), str(again)]) == 0
    assert load_generator(again).conv_clamp == 256


def test_what_the_user_says_goes_before_what_the_file_says(tmp_path: Path) -> None:
    source = ours(tmp_path / "g.safetensors", name="old", licence="CC0", seed="7")
    for i, (options, name, licence) in enumerate([([], "old", "CC0"), (["--name", "n", "--licence", "l"], "n", "l")]):
        out = tmp_path / f"{i}.safetensors"
        assert command.main(["convert", str(source), str(out), *options]) == 0
        with safe_open(out, framework="pt") as file:
            notes = file.metadata()
        assert (notes["name"], notes["licence"], notes["seed"]) == (name, licence, "7")


def test_the_licence_of_a_card_is_kept(tmp_path: Path, shelf) -> None:
    source, out = foreign(tmp_path / "g.pt"), tmp_path / "out.safetensors"
    shelf(mine={"file": "other.pt", "sha256": sha256_of(source)}, namesake={"file": "g.pt", "resolution": 64})
    assert command.main(["convert", str(source), str(out)]) == 0
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["name"] == "mine"
        assert file.metadata()["licence"] == "for tests, https://example.org/licence"


@pytest.mark.parametrize("content", [b"precious", b""])
def test_only_our_own_generators_are_overwritten(tmp_path: Path, capsys, content: bytes) -> None:
    source, out = foreign(tmp_path / "g.pt"), tmp_path / "out.safetensors"
    out.write_bytes(content)
    for options in ([], ["--overwrite"]):
        assert command.main(["convert", str(source), str(out), *options]) == 1
        assert "no earlier call wrote it" in capsys.readouterr().err and out.read_bytes() == content
    out.unlink()
    assert command.main(["convert", str(source), str(out)]) == 0
    assert command.main(["convert", str(source), str(out)]) == 1
    assert command.main(["convert", str(source), str(out), "--overwrite", "--name", "again"]) == 0
    content = out.read_bytes()
    assert command.main(["convert", str(out), str(out), "--overwrite", "--dtype", "float16"]) == 1
    assert out.read_bytes() == content


@pytest.mark.parametrize("arguments", [["convert", "g.pt", "out.pt"], ["convert", "g.pt"], [], ["inspect"], ["burn"]])
def test_wrong_commands_end_with_status_2(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2 and "usage:" in capsys.readouterr().err


def test_convert_names_what_is_wrong_and_writes_nothing(tmp_path: Path, capsys) -> None:
    broken = foreign(tmp_path / "g.pt", without="synthesis.b4.const")
    assert command.main(["convert", str(broken), str(tmp_path / "out.safetensors")]) == 1
    assert "synthesis.b4.const" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["g.pt"]


# cards


def test_every_card_is_complete() -> None:
    all_cards = read_cards()
    assert {"ffhq1024", "ffhq512", "ffhq256", "celebahq256"} <= all_cards.keys()
    for name, card in all_cards.items():
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert card.url is None or card.url.startswith("https://") and card.url.endswith("/" + card.file)
        assert card.source.startswith("https://") and card.licence_url.startswith("https://")
        assert card.sha256 is None or re.fullmatch("[0-9a-f]{64}", card.sha256)
        assert card.resolution in (256, 512, 1024)
        assert Path(card.file).name == card.file and Path(card.file).suffix in (".pkl", ".pt", ".pth")
        assert all(isinstance(text, str) and text for text in (card.layout, card.licence, card.note))
    assert len({card.file for card in all_cards.values()}) == len(all_cards)


def test_a_card_with_a_wrong_field_is_refused(tmp_path: Path) -> None:
    content = yaml.safe_load(CARDS.read_text())
    del content["ffhq256"]["licence"]
    (tmp_path / "cards.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="ffhq256.*licence"):
        read_cards(tmp_path / "cards.yaml")


def test_list_shows_what_is_here(machine: Path, capsys) -> None:
    place = machine / "own" / find_card("ffhq512").file
    place.parent.mkdir()
    place.write_bytes(bytes(2_500_000))
    assert command.main(["list"]) == 0
    table, _, terms = capsys.readouterr().out.partition("\n\nTERMS\n")
    lines = {line.split()[0]: line for line in table.splitlines()}
    assert lines.keys() - {"NAME"} == read_cards().keys()
    assert "2.5 MB" in lines["ffhq512"] and str(place) in lines["ffhq512"]
    assert re.search(r" no +\d ", lines["ffhq256"]) and " no, by hand " in lines["ffhq1024-rosinality"]
    column = lines["NAME"].index("TERMS")
    numbered = dict(re.findall(r"^(\d)  (.*\n   https:.*)$", terms, flags=re.M))
    for name, card in read_cards().items():
        assert numbered[lines[name][column]] == f"{card.licence}\n   {card.licence_url}"


# fetch


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts cards in the place of the project's."""

    def put(**content: dict) -> None:
        full = {"file": "net.pkl", "url": None, "source": "https://example.org", "sha256": None, "resolution": 32}
        full |= {"layout": "any", "licence": "for tests", "licence_url": "https://example.org/licence", "note": "None"}
        (tmp_path / "cards").write_text(yaml.safe_dump({name: {**full, **card} for name, card in content.items()}))
        monkeypatch.setattr(pretrained, "CARDS", tmp_path / "cards")

    return put


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_fetch_puts_the_file_where_it_is_found(machine: Path, shelf, capsys) -> None:
    origin = put(machine / "web" / "net.pkl", CONTENT)
    shelf(net={"url": origin.as_uri(), "sha256": DIGEST})
    for _ in range(2):  # the second time it is here
        assert command.main(["fetch", "net"]) == 0
        out, err = capsys.readouterr()
        assert out.index("for tests") < out.index(DIGEST) and str(machine / "own" / "net.pkl") in out
        assert "warning" not in err
        origin.unlink(missing_ok=True)
    assert (machine / "own" / "net.pkl").read_bytes() == CONTENT and names(machine / "own") == ["net.pkl"]
    put(origin, CONTENT)
    assert command.main(["fetch", "net", "--out", str(machine / "there")]) == 0
    assert names(machine / "there") == ["net.pkl"]


def test_without_a_known_sha256_it_warns_and_shows_what_it_found(machine: Path, shelf, capsys) -> None:
    shelf(net={"url": put(machine / "web" / "net.pkl", CONTENT).as_uri()})
    assert command.main(["fetch", "net"]) == 0
    err = capsys.readouterr().err
    assert "warning" in err and DIGEST in err
    assert names(machine / "own") == ["net.pkl"]


WRONG = {"sha256": (CONTENT, "0" * 64, DIGEST[:8]), "web page": (b"<html>sign in</html>", None, "a web page")}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_not_kept(machine: Path, shelf, capsys, kind: str) -> None:
    content, sha256, reason = WRONG[kind]
    shelf(net={"url": put(machine / "web" / "net.pkl", content).as_uri(), "sha256": sha256})
    assert command.main(["fetch", "net"]) == 1
    assert reason in capsys.readouterr().err and names(machine / "own") == []


def test_a_file_here_with_a_wrong_sha256_is_named(machine: Path, shelf, capsys) -> None:
    shelf(net={"url": "https://example.org/net.pkl", "sha256": DIGEST})
    put(machine / "own" / "net.pkl", b"something else")
    assert command.main(["fetch", "net"]) == 1
    assert str(machine / "own" / "net.pkl") in capsys.readouterr().err
    assert (machine / "own" / "net.pkl").read_bytes() == b"something else"


@pytest.mark.parametrize("case", ["offline", "gone", "by hand"])
def test_without_the_network_it_says_what_belongs_where(machine: Path, shelf, capsys, case) -> None:
    gone = (machine / "absent.pkl").as_uri()
    url = {"offline": "http://127.0.0.1:9/net.pkl", "gone": gone, "by hand": None}[case]
    shelf(net={"url": url})
    assert command.main(["fetch", "net"]) == 1
    err = capsys.readouterr().err
    assert str(machine / "own" / "net.pkl") in err and (url or "https://example.org") in err
    assert pretrained.VARIABLE in err and names(machine / "own") == []


def test_an_unknown_name_is_told_the_known_ones(capsys) -> None:
    assert command.main(["fetch", "ffhq257"]) == 1
    assert "ffhq256" in capsys.readouterr().err


# the program


def test_help_teaches_and_its_commands_are_real() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "models.checkpoints", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"python -m models\.checkpoints (\w.*)", done.stdout)
    assert {line.split()[0] for line in shown} == {"inspect", "convert", "fetch", "list"}
    for line in shown:
        args = command._parser().parse_args(shlex.split(line))
        if getattr(args, "name", None) and line.startswith("fetch"):
            find_card(args.name)


def test_ctrl_c_ends_with_130(monkeypatch, capsys, shelf) -> None:
    shelf(net={"url": "https://example.org/net.pkl"})

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "fetch", interrupted)
    assert command.main(["fetch", "net"]) == 130
    assert "interrupted" in capsys.readouterr().err
