"""What a run makes of its flags and its machine before it trains."""

from types import SimpleNamespace

from caption_train.config.training import TrainOptions
from caption_train.training import prepare


def test_workers_share_the_cores_of_their_own_machine_alone(monkeypatch):
    asked = []
    for name in ("choose_workers", "default_workers"):
        monkeypatch.setattr(prepare, name, lambda *given: asked.append(given[-1]) or 1)
    accelerator = SimpleNamespace(device="cpu", num_processes=16, is_main_process=False)
    data = SimpleNamespace(measure_megapixels=lambda: 0.0)
    for known in ({"LOCAL_WORLD_SIZE": "2"}, {}):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        for name, value in known.items():
            monkeypatch.setenv(name, value)
        for options in (TrainOptions(num_workers="auto"), TrainOptions()):
            start = prepare.Start(options, None, None, {})
            assert prepare._limit_workers(start, lambda: 1, accelerator, data).options.num_workers == 1
    assert asked == [2, 2, 16, 16]
