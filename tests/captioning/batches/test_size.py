"""How many images are captioned at once: as many as memory has room for, and fewer when it has not."""

import json

import pytest
import torch

from caption_train.captioning.batches import size
from caption_train.captioning.batches.size import BatchSize, GrowingBatches
from caption_train.captioning.job import caption_folder
from caption_train.config.captioning import CaptionOptions
from caption_train.errors import UsageError
from caption_train.system import memory, workers
from tests.fixtures.fake_family import FakeFamily
from tests.fixtures.shards import make_image, write_shard

CPU = torch.device("cpu")
COUNT = 40


class Room(FakeFamily):
    """Has memory for some images at a time."""

    def __init__(self, room):
        super().__init__()
        self.room = room

    def generate(self, model, processor, batch, **settings):
        if len(batch["pixel_values"]) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().generate(model, processor, batch, **settings)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(COUNT):
        (tmp_path / "in" / f"{number:02}.png").write_bytes(make_image(number % 7))
    return tmp_path


@pytest.fixture
def machine(monkeypatch):
    """Let the machine have `free` bytes, of which every image takes a hundred."""

    def have(free):
        sizes = []
        monkeypatch.setattr(size, "available_memory", lambda device: free)
        monkeypatch.setattr(size, "start_peak", lambda device: 1000)
        monkeypatch.setattr(size, "peak_memory", lambda device: 1000 + 100 * sizes[-1])
        plain = FakeFamily.generate

        def generate(family, model, processor, batch, **settings):
            sizes.append(len(batch["pixel_values"]))
            return plain(family, model, processor, batch, **settings)

        monkeypatch.setattr(FakeFamily, "generate", generate)
        return sizes

    return have


def run(folder, family, name, **options):
    settings = {"images": [str(folder / "in")], "output": folder / name, "num_workers": 0}
    options = CaptionOptions(**settings | {"batch_size": "auto"} | options)
    assert options.check() == []
    assert caption_folder(options, family) == 0
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_batches_grow_while_memory_has_room_and_captions_stay_the_same(folder, machine, capsys):
    plain = run(folder, FakeFamily(), "plain.jsonl", batch_size=4)
    sizes = machine(free=10_000)
    assert run(folder, FakeFamily(), "auto.jsonl") == plain
    assert sizes == [4, 8, 16, 12]
    assert capsys.readouterr().err.count("--batch_size auto: 16") == 1


@pytest.mark.parametrize("free, most", [(1999, 4), (2001, 8)])
def test_batches_do_not_grow_into_what_another_would_need(folder, machine, capsys, free, most):
    sizes = machine(free)
    run(folder, FakeFamily(), "auto.jsonl")
    assert max(sizes) == most and f"--batch_size auto: {most}\n" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_does_not_fit_is_halved_and_does_not_grow_again(folder, machine, capsys, workers):
    plain = run(folder, FakeFamily(), "plain.jsonl", batch_size=4)
    machine(free=10_000)
    family = Room(6)
    assert run(folder, family, "auto.jsonl", num_workers=workers) == plain
    assert max(family.model.batches) == 4 and sum(family.model.batches) == COUNT
    err = capsys.readouterr().err
    assert err.count("out of memory with --batch_size 8: going on with 4") == 1
    assert "--batch_size auto: 8" not in err


def test_a_number_that_does_not_fit_is_halved_too(folder, capsys):
    plain = run(folder, FakeFamily(), "plain.jsonl", batch_size=4)
    assert run(folder, Room(3), "halved.jsonl", batch_size=10) == plain
    lines = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert [line.rsplit(": ")[1] for line in lines] == ["going on with 5", "going on with 2"]


@pytest.mark.parametrize(("rank", "who"), [("0", "process 0: "), ("1", "process 1: ")])
def test_of_several_processes_each_says_for_itself_what_did_not_fit_and_one_what_is_the_same(
    monkeypatch, capsys, rank, who
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    size = BatchSize(8, CPU)
    assert size.halve() == f"{who}out of memory with --batch_size 8: going on with 4"
    for _ in range(2):
        size.choose_workers(None)
    assert capsys.readouterr().err.count("--num_workers auto: ") == int(rank == "0")


def test_workers_are_chosen_once_for_images_in_shards(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    write_shard(tmp_path / "in/0.tar")
    settings = {"images": [str(tmp_path / "in")], "output_shards": str(tmp_path / "out")}
    assert caption_folder(CaptionOptions(**settings, num_workers="auto"), FakeFamily()) == 0
    assert capsys.readouterr().err.count("--num_workers auto: ") == 1


def test_shards_are_captioned_in_growing_batches_too(tmp_path, machine, capsys):
    (tmp_path / "in").mkdir()
    write_shard(tmp_path / "in/0.tar")
    write_shard(tmp_path / "in/1.tar", start=7)
    sizes = machine(free=10_000)
    settings = {"images": [str(tmp_path / "in")], "output_shards": str(tmp_path / "out"), "num_workers": 0}
    assert caption_folder(CaptionOptions(**settings, batch_size="auto"), FakeFamily()) == 0
    assert sizes == [4, 8, 2] and "14 images captioned" in capsys.readouterr().err


def test_batches_that_were_made_before_it_grew_do_not_let_it_grow(machine):
    sizes = machine(free=10_000)
    size = BatchSize("auto", CPU)
    for rows in (4, 4, 8):
        sizes.append(rows)
        with size.measuring(rows):
            pass
    assert size.now == 16


def test_a_batch_is_as_large_as_it_is_when_it_is_asked_for():
    size = BatchSize("auto", CPU)
    batches = iter(GrowingBatches(11, size))
    first = next(batches)
    size.now = 8
    assert [first, *batches] == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10]]


@pytest.mark.parametrize("most, limited", [(1, 4), (7, 4), (8, 8), (99, 16)])
def test_batches_grow_to_what_the_workers_have_room_for(most, limited):
    size = BatchSize("auto", CPU)
    size.limit(most)
    assert size.most == limited


def test_the_room_of_workers_is_shared_by_all_batches_on_their_way(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 6000}))
    assert workers.limit_batch(2, 100) == 10


def test_a_containers_limit_counts_without_what_is_only_cached(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "none")
    before = memory.available_memory(CPU)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 300\n")
    assert memory.available_memory(CPU) > before / 2
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory.available_memory(CPU) == 400
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("1000\n")
    (tmp_path / "memory/memory.usage_in_bytes").write_text("950\n")
    (tmp_path / "memory/memory.stat").write_text("inactive_file 1\ntotal_inactive_file 20\n")
    assert memory.available_memory(CPU) == 70


GROUPS = [
    # (control groups that this process is in, files of a group that has a limit, its place, memory with room)
    ("0::/slurm/job_7/step_0\n", "v2", "slurm/job_7", 350),
    ("0::/slurm/job_7/step_0\n", "v2", "slurm/job_7/step_0", 350),
    ("0::/slurm/job_7/step_0\n", "v2", "", 350),
    ("0::/../../user.slice/a\n", "v2", "user.slice", 350),
    ("0::/docker/of the host:1\n", "v2", "", 350),
    ("0::/slurm/job_8\n", "v2", "slurm/job_7", None),
    ("5:cpu,cpuacct:/cpu\n4:pids,memory:/slurm/job_7\n0::/\n", "v1", "memory/slurm/job_7", 350),
    ("4:memory:/slurm/job_7\n", "v1", "memory/slurm", 350),
    ("4:memory:/slurm/job_7\n", "v1", "memory/cpu", None),
    ("not a line of it\n", "v2", "", 350),
]


@pytest.mark.parametrize(("own", "version", "place", "room"), GROUPS)
def test_limits_of_all_groups_that_a_process_is_in_count(monkeypatch, tmp_path, own, version, place, room):
    limits = {
        "v2": ("memory.max", "memory.current", "inactive_file"),
        "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }
    limit, usage, cached = limits[version]
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "own").write_text(own)
    free = memory.available_memory(CPU)
    group = tmp_path / "groups" / place
    group.mkdir(parents=True)
    for name, content in ((limit, "1000"), (usage, "700"), ("memory.stat", f"anon 5\n{cached} 50\n")):
        (group / name).write_text(f"{content}\n")
    # What lies outside of the tree is none of ours.
    (tmp_path / limit).write_text("0\n")
    found = memory.available_memory(CPU)
    assert found == room if room else found > free / 2


def test_the_group_with_the_least_room_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "own").write_text("0::/a/b\n")
    (tmp_path / "a/b").mkdir(parents=True)
    for place, most, used in ((".", 5000, 4900), ("a", 2000, 1950), ("a/b", 900, 100)):
        (tmp_path / place / "memory.max").write_text(str(most))
        (tmp_path / place / "memory.current").write_text(str(used))
        (tmp_path / place / "memory.stat").write_text("inactive_file 0\n")
    assert memory.available_memory(CPU) == 50


def test_the_memory_of_a_batch_is_measured_on_a_cpu():
    held = memory.start_peak(CPU)
    tensor = torch.ones(300 << 20, dtype=torch.uint8)
    assert memory.peak_memory(CPU) - held > len(tensor) // 2


def test_it_does_not_go_with_ray():
    assert CaptionOptions(images=["a"], engine="ray", batch_size="auto").check() == [
        "--batch_size auto does not go with --engine ray: give a number"
    ]


def test_another_word_is_refused(monkeypatch):
    from caption_train.cli.arguments import parse_options

    with pytest.raises(UsageError, match="batch_size"):
        parse_options(CaptionOptions, ["--images", "a", "--batch_size", "many"], prog="x")
