"""In Python, as in a run, a sample or a method that fails costs the others nothing, and is named in what comes back."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from nets import small_cnn, small_cnn_images
from PIL import Image
from tiny import write_image

import attrib
from attrib.methods.baselines import Gradient, Random
from attrib.types import UserError

HOW = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
CORRUPT = "b.png"


@pytest.fixture
def images():
    return small_cnn_images()[0][:3]


@pytest.fixture
def files(tmp_path):
    for i, name in enumerate(("a.png", CORRUPT, "c.png")):
        write_image(tmp_path / name, i)
    (tmp_path / CORRUPT).write_bytes(b"no image")
    return [tmp_path / name for name in ("c.png", CORRUPT, "a.png")]


@dataclasses.dataclass(frozen=True)
class Odd(Gradient):
    """It raises ValueError, or UserError, for the samples of these names."""

    uids: tuple[str, ...] = ()
    refuses: bool = False

    def attribute(self, model, batch, state, noise):
        if set(batch.uids) & set(self.uids):
            raise (UserError if self.refuses else ValueError)("that is beyond me")
        return super().attribute(model, batch, state, noise)


def explain(x, method="gradient", **more):
    return attrib.explain(small_cnn(), x, 0, method, transform=HOW, **more)


def test_a_corrupt_image_costs_itself_only(files, tmp_path, caplog):
    found = explain(files)
    assert (found.uids, found.asked) == (("c.png", "a.png"), ("c.png", CORRUPT, "a.png"))
    assert list(found.failures) == [CORRUPT]
    assert f"gradient left out a sample: {CORRUPT}: " in caplog.text
    assert repr(found) == "Explanation(gradient of 2 samples, 1 failed: map (2, 32, 32))"
    torch.testing.assert_close(found.map, explain([files[0], files[2]]).map, rtol=0, atol=0)
    assert CORRUPT in found._repr_html_()
    assert pickle.loads(pickle.dumps(found)).failures == found.failures
    folder = found.save(tmp_path / "saved")
    assert CORRUPT in (folder / "explanation.json").read_text()
    rows = found.evaluate("insertion_deletion")
    assert dict(zip(rows["uid"], rows["state"])) == {"c.png": "ok", CORRUPT: "failed", "a.png": "ok"}
    assert list(dict.fromkeys(rows["uid"])) == ["c.png", CORRUPT, "a.png"]
    assert rows.loc[rows["uid"] == CORRUPT, "reason"].unique().tolist() == [found.failures[CORRUPT]]
    assert attrib.evaluate(None, files, found, "insertion_deletion").equals(rows)
    with pytest.raises(attrib.UserError, match=r"^no sample of the dataset can be read \(b\.png: "):
        explain([files[1]])


def test_regions_are_of_all_that_were_given(files):
    roi = np.zeros((3, *_size(files[0])), dtype=bool)
    roi[:, :8] = True
    rows = explain(files).evaluate("ehr", roi)
    assert rows["state"].tolist() == ["ok", "failed", "ok"]
    maps = torch.rand(3, 32, 32)
    rows = attrib.evaluate(small_cnn(), files, maps, ["ehr", "insertion_deletion"], roi, target=0, transform=HOW)
    assert rows.groupby("uid")["state"].unique().map(list).to_dict() == {
        "a.png": ["ok"],
        CORRUPT: ["failed"],
        "c.png": ["ok"],
    }


def _size(file):
    with Image.open(file) as image:
        return image.height, image.width


def test_a_method_that_raises_costs_its_samples_only(images):
    found = explain(images, Odd(uids=("b",)), uids=["a", "b", "c"])
    assert (found.uids, found.failures) == (("a", "c"), {"b": "b: ValueError: that is beyond me"})
    with pytest.raises(ValueError, match=r"^that is beyond me$"):  # with its traceback: nothing else is left
        explain(images, Odd(uids=("a", "b", "c")), uids=["a", "b", "c"])
    with pytest.raises(UserError, match=r"^that is beyond me$"):
        explain(images, Odd(uids=("b",), refuses=True), uids=["a", "b", "c"])


def test_what_all_methods_share_is_said_once(images, files, caplog):
    attrib.compare(small_cnn(), files, ["gradient", "random"], "insertion_deletion", target=0, transform=HOW)
    left_out = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(left_out) == 1
    assert left_out[0].startswith(f"gradient, random left out a sample: {CORRUPT}: ")


def test_of_many_failures_the_first_are_said(caplog):
    names = [f"n{i:02}" for i in range(40)]
    found = explain(torch.rand(40, 3, 32, 32), Odd(uids=tuple(names[1:])), uids=names)
    left_out = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(left_out) == 11
    assert left_out[-1] == "and 29 more are left out; failures has all reasons"
    assert left_out[0] == "odd left out a sample: n01: ValueError: that is beyond me"
    assert found.uids == ("n00",)
    assert len(found.failures) == 39


def test_a_refused_method_costs_itself_only(images, tmp_path, caplog):
    methods = {
        "gradient": Gradient(),
        "refuses": Odd(uids=("b",), refuses=True),
        "some": Odd(uids=("b",)),
        "raises": Odd(uids=("a", "b", "c")),
        "unfitted": "iba",
    }
    names = ["a", "b", "c"]
    found = attrib.compare(small_cnn(), images, methods, "insertion_deletion", target=0, uids=names)
    assert list(found.explanations) == list(found.scored) == ["gradient", "some"]
    assert found.refused["refuses"] == "that is beyond me"
    assert found.refused["raises"] == "ValueError: that is beyond me"
    assert found.refused["unfitted"].startswith("unfitted is fitted on data first: give it some (fit=...)")
    assert "method refuses is left out: that is beyond me" in caplog.text
    assert "refuses was left out: that is beyond me" in repr(found)
    assert "some: no map: b: ValueError" in repr(found)
    counts = found.table.drop_duplicates("method").set_index("method")[["n", "failed"]]
    assert counts.to_dict("index") == {"gradient": {"n": 3, "failed": 0}, "some": {"n": 2, "failed": 1}}
    failed = found.rows[found.rows["state"] == "failed"]
    assert set(failed["stage"]) == {"maps"}
    text = (found.save(tmp_path) / "comparison.html").read_text()
    assert "refuses was left out" in text
    assert (tmp_path / "some" / "maps.safetensors").is_file()
    found.plot()
    both = {"a": methods["refuses"], "b": methods["raises"]}
    with pytest.raises(UserError, match=r"^no method is left:\n  a: that is beyond me\n  b: ValueError: that"):
        attrib.compare(small_cnn(), images, both, "insertion_deletion", target=0, uids=names)
    with pytest.raises(UserError, match="needs regions of interest; give them as roi="):
        attrib.compare(small_cnn(), images, methods, "ehr", target=0, uids=names)


def test_of_many_samples_that_failed_a_comparison_names_some():
    names = [f"s{i}" for i in range(14)]
    found = attrib.compare(
        small_cnn(), torch.rand(14, 3, 8, 8), [Odd(uids=tuple(names[1:]))], "insertion_deletion", target=0, uids=names
    )
    assert len(found.problems) == 13
    assert repr(found).endswith("and 3 more: see problems")


def test_a_refused_metric_costs_itself_only(images, monkeypatch):
    from attrib.metrics.infidelity import Infidelity

    def refuses(self, *_, **__):
        raise UserError("not for this net")

    monkeypatch.setattr(Infidelity, "score", refuses)
    found = explain(images, Random())
    rows = found.evaluate(["infidelity", "insertion_deletion"])
    assert rows.groupby("metric")["state"].unique().map(list).to_dict() == {
        "infidelity": ["failed"],
        "insertion_deletion": ["ok"],
    }
    assert set(rows.loc[rows["metric"] == "infidelity", "reason"]) == {"not for this net"}
    with pytest.raises(UserError, match=r"^not for this net$"):
        found.evaluate("infidelity")


def test_a_corrupt_sound_costs_itself_only(tmp_path):
    import soundfile

    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, np.sin(np.arange(800) / 9), 8000)
    (tmp_path / "c.wav").write_bytes(b"no sound")
    net = torch.nn.Sequential(torch.nn.Conv1d(1, 4, 9, 4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(3))
    net(torch.zeros(1, 1, 800))
    sounds = [tmp_path / name for name in ("a.wav", "c.wav", "b.wav")]
    found = attrib.explain(net, sounds, 0, "gradient", transform={"rate": 8000, "length": 800})
    assert (found.uids, list(found.failures)) == (("a.wav", "b.wav"), ["c.wav"])


class Missing(torch.utils.data.Dataset):
    """Three samples, of which those at these places cannot be read."""

    def __init__(self, images, *places):
        self.images, self.places = images, places

    def __len__(self):
        return len(self.images)

    def __getitem__(self, place):
        if place in self.places:
            raise OSError("disk")
        return self.images[place], torch.tensor([place])


def test_the_first_sample_of_a_torch_dataset_costs_itself_only(images):
    found = attrib.explain(small_cnn(), Missing(images, 0), "label", "gradient")
    assert (found.uids, found.failures) == (("1", "2"), {"0": "0: OSError: disk"})
    assert found.target.tolist() == [1, 2]
    with pytest.raises(OSError, match="disk"):
        attrib.explain(small_cnn(), Missing(images, 0, 1, 2), "label", "gradient")


def test_a_root_that_is_no_folder(images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"root='.*file': what is fitted cannot be kept there: .*Not a directory"):
        explain(images, "iba", fit=images, root=tmp_path / "file")
