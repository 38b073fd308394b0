"""--profile: its table adds up, its trace holds the parts of a step, and mistakes are said in one line."""

import gzip
import json
import time

import pytest

import train

OPTIONS = ["--profile", "--source-count", "40", "--target-count", "20", "--batch-size", "4", "--image-size", "32", "--device",
           "cpu"]
PRETRAINING = {"data", "augmentation", "student", "losses", "losses, backward", "student, backward", "optimiser", "log"}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(train, "PROFILE_STEPS", 3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A directory for rendered images."""
    return str(tmp_path_factory.mktemp("cache"))


def table(text):
    """The printed table: milliseconds and percent by row and phase."""
    lines = text[text.index("ms a step"):].splitlines()
    rows = {line[:20].strip(): [float(word) for word in line[20:].replace("%", "").split()] for line in lines[1:-1]}
    return lines[0].split()[3:], rows


@pytest.mark.parametrize("options, networks", [
    (["--accumulate", "2", "--style", "small", "--style-prob", "1"], {"style", "teacher"}),
    (["--style", "off"], {"teacher"}),
    (["--method", "source-only"], None),
    (["--method", "oracle", "--amp", "bf16"], None)])
def test_the_table_adds_up_and_the_trace_names_the_parts(options, networks, cache, tmp_path, capsys):
    assert train.main([*OPTIONS, *options, "--cache", cache, "--out", str(tmp_path)]) == 0
    phases, rows = table(capsys.readouterr().out)
    assert phases == ["pretraining", "adaptation"][:1 if networks is None else 2]
    parts = PRETRAINING | (networks or set())
    assert rows.keys() == parts | {"outside the networks", "in all"}
    for column in range(len(phases)):
        times, shares = ({part: values[2 * column + i] for part, values in rows.items()} for i in (0, 1))
        assert sum(times[part] for part in parts) == pytest.approx(times["in all"], abs=0.01 * len(parts))
        outside = parts - {"student", "student, backward", "teacher", "style"}
        assert sum(times[part] for part in outside) == pytest.approx(times["outside the networks"], abs=0.01 * len(parts))
        assert sum(shares[part] for part in parts) == pytest.approx(100, abs=0.1 * len(parts))
        assert shares["outside the networks"] < shares["in all"] == 100
        assert all(times[part] > 0 for part in PRETRAINING)
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json.gz"]      # nothing of a run
    with gzip.open(tmp_path / "profile.json.gz") as f:
        events = json.load(f)["traceEvents"]
    assert parts <= {event["name"] for event in events if event.get("cat") == "user_annotation"}


def test_the_time_is_that_of_the_step(cache, tmp_path, monkeypatch):
    """20 ms more in each teacher's forward pass are found with the teacher, not elsewhere."""
    settings = train.make_settings(source_count=40, target_count=20, batch_size=4, image_size=32, style="off", cache=cache)
    slow, forward = 0.02, train._call

    def call(network, images):
        if not network.head.weight.requires_grad:
            time.sleep(slow)
        return forward(network, images)

    monkeypatch.setattr(train, "_call", call)
    found = train.profile(settings, tmp_path, "cpu")
    assert found["adaptation"]["teacher"] > slow and "teacher" not in found["pretraining"]


@pytest.mark.parametrize("options, text", [
    (["--lr", "1e30"], "lower --lr"),
    (["--resume"], "leave out --resume"),
    (["--profil"], "did you mean --profile?"),
    (["--method", "udape", "--out", "FILE/run"], "FILE is not a writable directory")])
def test_mistakes(options, text, cache, tmp_path, capsys):
    (tmp_path / "FILE").write_text("")
    options = [option.replace("FILE", str(tmp_path / "FILE")) for option in options]
    assert train.main([*OPTIONS, "--style", "off", "--cache", cache, "--out", str(tmp_path / "r"), *options]) == 2
    error = capsys.readouterr().err
    assert text.replace("FILE", str(tmp_path / "FILE")) in error and len(error.splitlines()) == 1
    assert not (tmp_path / "r").exists()


def test_a_batch_that_processes_cannot_share(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(train.UserError, match="--batch-size: 6 cannot be shared by 4 processes"):
        train.profile(train.make_settings(batch_size=6), tmp_path / "never", "cpu")
