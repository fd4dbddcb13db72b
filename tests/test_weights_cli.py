"""The command line for weights: looks into files, converts them, knows published ones and downloads them."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from models import pretrained
from models.generator import Generator
from models.weights import __main__ as command
from models.weights import cards, download, load_generator, save_generator, sha256_of
from models.weights.cards import CARDS, find_card, read_cards
from models.weights.download import CutError

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
    assert "licence" not in rows(out) and rows(out)["note name"].startswith(r"\x1b[2Jmine licence CC0\u202e")
    assert all(c.isprintable() or c == "\n" for c in out) and max(map(len, out.splitlines())) < 700


def test_what_readers_warn_of_is_said(tmp_path: Path, monkeypatch, capsys) -> None:
    path = foreign(tmp_path / "g.pt")
    read = command.read_checkpoint

    def warning_reader(path):
        warnings.warn(f"{path}: noise maps are missing", UserWarning, stacklevel=2)
        return read(path)

    monkeypatch.setattr(command, "read_checkpoint", warning_reader)
    assert command.main(["inspect", str(path)]) == 0
    assert capsys.readouterr().err == f"note: {path}: noise maps are missing\n"


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


def test_nothing_is_overwritten_unasked(tmp_path: Path, capsys) -> None:
    source, out = foreign(tmp_path / "g.pt"), tmp_path / "out.safetensors"
    out.write_text("precious")
    assert command.main(["convert", str(source), str(out)]) == 1
    assert "--overwrite" in capsys.readouterr().err and out.read_text() == "precious"
    assert command.main(["convert", str(source), str(out), "--overwrite"]) == 0
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


class Server(ThreadingHTTPServer):
    """Serves CONTENT; what it does wrong is set from outside, and what it was asked for is kept."""

    ranges, tag, cut_after, status, location, kind = True, '"1"', None, 200, "", "application/octet-stream"
    content = CONTENT

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/net.pkl"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        server.asked.append(dict(self.headers))
        if server.status != 200 and self.path == "/net.pkl":
            self.send_response(server.status)
            self.send_header("Location", server.location)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start, content = int(self.headers.get("Range", "bytes=0-")[6:-1]), server.content
        if not server.ranges or self.headers.get("If-Range", server.tag) != server.tag:
            start = 0
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if server.tag:
            self.send_header("ETag", server.tag)
        self.send_header("Content-Type", server.kind)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : server.cut_after])

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with probe:
        try:
            probe.connect(("127.0.0.1", 9))
        except OSError:
            pytest.skip("this machine has not even a loopback network")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts cards in the place of the project's."""

    def put(**content: dict) -> None:
        full = {"file": "net.pkl", "url": None, "source": "https://example.org", "sha256": None, "resolution": 32}
        full |= {"layout": "any", "licence": "for tests", "licence_url": "https://example.org/licence", "note": "None"}
        (tmp_path / "cards").write_text(yaml.safe_dump({name: {**full, **card} for name, card in content.items()}))
        monkeypatch.setattr(cards, "CARDS", tmp_path / "cards")

    return put


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_fetch_puts_the_file_where_it_is_found(machine: Path, server: Server, shelf, capsys) -> None:
    shelf(net={"url": server.url, "sha256": DIGEST})
    for _ in range(2):  # the second time it is here
        assert command.main(["fetch", "net"]) == 0
        out, err = capsys.readouterr()
        assert out.index("for tests") < out.index(DIGEST) and str(machine / "own" / "net.pkl") in out
        assert "warning" not in err
    assert len(server.asked) == 1
    assert (machine / "own" / "net.pkl").read_bytes() == CONTENT and names(machine / "own") == ["net.pkl"]
    assert command.main(["fetch", "net", "--out", str(machine / "there")]) == 0
    assert names(machine / "there") == ["net.pkl"]


def test_without_a_known_sha256_it_warns_and_shows_what_it_found(machine: Path, server: Server, shelf, capsys) -> None:
    shelf(net={"url": server.url})
    assert command.main(["fetch", "net"]) == 0
    err = capsys.readouterr().err
    assert "warning" in err and DIGEST in err
    assert names(machine / "own") == ["net.pkl"] and yaml.safe_load(cards.CARDS.read_text())["net"]["sha256"] is None


@pytest.mark.parametrize("ranges", [True, False], ids=["with Range", "without Range"])
def test_a_cut_download_goes_on(machine: Path, server: Server, shelf, capsys, ranges: bool) -> None:
    shelf(net={"url": server.url})
    server.cut_after = 4000
    assert command.main(["fetch", "net"]) == 1
    assert "the same command goes on" in capsys.readouterr().err
    partial = machine / "own" / "net.pkl.partial"
    assert partial.read_bytes() == CONTENT[:4000] and not (machine / "own" / "net.pkl").exists()
    server.cut_after, server.ranges = None, ranges
    assert command.main(["fetch", "net"]) == 0
    assert server.asked[1]["Range"] == "bytes=4000-" and server.asked[1]["If-Range"] == '"1"'
    assert (machine / "own" / "net.pkl").read_bytes() == CONTENT and names(machine / "own") == ["net.pkl"]


def test_two_versions_are_never_joined(tmp_path: Path, server: Server) -> None:
    path = tmp_path / "net.pkl"
    server.cut_after = 4000
    with pytest.raises(CutError):
        download.download(server.url, path)
    server.cut_after, server.tag, server.content = None, '"2"', CONTENT[::-1]
    assert download.download(server.url, path) == hashlib.sha256(CONTENT[::-1]).hexdigest()
    assert server.asked[1]["If-Range"] == '"1"'


@pytest.mark.parametrize("tag", ["", 'W/"1"'], ids=["no tag", "weak tag"])
def test_without_a_validator_only_a_checksum_allows_to_go_on(tmp_path: Path, server: Server, tag: str) -> None:
    path = tmp_path / "net.pkl"
    server.cut_after, server.tag = 4000, tag
    for sha256 in (None, DIGEST):
        with pytest.raises(CutError):
            download.download(server.url, path, sha256)
    server.cut_after = None
    assert download.download(server.url, path, DIGEST) == DIGEST
    assert ["Range" in asked for asked in server.asked] == [False, True, True]


def test_a_partial_file_of_another_address_is_not_used(tmp_path: Path, server: Server) -> None:
    (tmp_path / "net.pkl.partial").write_bytes(b"of another")
    note = {"url": "https://example.org/net.pkl", "validator": '"1"'}
    (tmp_path / "net.pkl.partial.json").write_text(json.dumps(note))
    assert download.download(server.url, tmp_path / "net.pkl") == DIGEST
    assert "Range" not in server.asked[0] and names(tmp_path) == ["net.pkl"]


@pytest.mark.parametrize("extra", [b"", b"too much"], ids=["complete", "too long"])
def test_a_partial_file_with_nothing_missing(tmp_path: Path, server: Server, extra: bytes) -> None:
    (tmp_path / "net.pkl.partial").write_bytes(CONTENT + extra)
    assert download.download(server.url, tmp_path / "net.pkl", DIGEST) == DIGEST
    assert len(server.asked) == (2 if extra else 1) and names(tmp_path) == ["net.pkl"]


def test_a_wrong_sha256_keeps_nothing(machine: Path, server: Server, shelf, capsys) -> None:
    shelf(net={"url": server.url, "sha256": "0" * 64})
    assert command.main(["fetch", "net"]) == 1
    err = capsys.readouterr().err
    assert DIGEST in err and "0" * 64 in err and names(machine / "own") == []


def test_a_file_here_with_a_wrong_sha256_is_named(machine: Path, server: Server, shelf, capsys) -> None:
    shelf(net={"url": server.url, "sha256": DIGEST})
    (machine / "own").mkdir()
    (machine / "own" / "net.pkl").write_bytes(b"something else")
    assert command.main(["fetch", "net"]) == 1
    assert str(machine / "own" / "net.pkl") in capsys.readouterr().err
    assert (machine / "own" / "net.pkl").read_bytes() == b"something else" and not server.asked


def test_a_web_page_is_no_weights(machine: Path, server: Server, shelf, capsys) -> None:
    shelf(net={"url": server.url})
    server.kind = "text/html"
    assert command.main(["fetch", "net"]) == 1
    assert "web page" in capsys.readouterr().err and names(machine / "own") == []


@pytest.mark.parametrize("case", ["offline", "gone", "by hand"])
def test_without_the_network_it_says_what_belongs_where(machine: Path, server: Server, shelf, capsys, case) -> None:
    url = {"offline": "http://127.0.0.1:9/net.pkl", "gone": server.url, "by hand": None}[case]
    server.status = 404
    shelf(net={"url": url})
    assert command.main(["fetch", "net"]) == 1
    err = capsys.readouterr().err
    assert str(machine / "own" / "net.pkl") in err and (url or "https://example.org") in err
    assert pretrained.VARIABLE in err and names(machine / "own") == []


def test_an_unknown_name_is_told_the_known_ones(capsys) -> None:
    assert command.main(["fetch", "ffhq257"]) == 1
    assert "ffhq256" in capsys.readouterr().err


def test_redirections_stay_with_the_scheme(tmp_path: Path, server: Server) -> None:
    server.status, server.location = 302, server.url.replace("net", "moved")
    assert download.download(server.url, tmp_path / "net.pkl") == DIGEST
    for location in ("ftp://127.0.0.1/net.pkl", "https://example.org/net.pkl", "http://example.org/net.pkl"):
        server.location = location
        with pytest.raises(ValueError, match=re.escape(location)):
            download.download(server.url, tmp_path / "other.pkl")


@pytest.mark.parametrize("url", ["http://example.org/n.pkl", "file:///etc/passwd", "ftp://example.org/n", "https:///n"])
def test_only_https(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match="https"):
        download.download(url, tmp_path / "n.pkl")
    assert names(tmp_path) == []


# the program


def test_help_teaches_and_its_commands_are_real() -> None:
    done = subprocess.run([sys.executable, "-m", "models.weights", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"python -m models\.weights (\w.*)", done.stdout)
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
