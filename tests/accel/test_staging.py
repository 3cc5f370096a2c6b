"""On a GPU a save holds what the stream of the thread that saves has computed, or is still computing."""

from pathlib import Path

import torch

from distckpt import DiskSaver


def test_a_save_waits_for_the_stream_that_computes_what_is_saved(tmp_path: Path) -> None:
    saver = DiskSaver(tmp_path)
    for number in range(1, 21):
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]  # torch ships it without types
            values = torch.zeros(1 << 20, device="cuda")
            torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]  # as above
            values += number
            saver({"values": values}, "a.pt")
        loaded = torch.load(tmp_path / "a.pt", map_location="cpu", weights_only=True)["values"]
        assert bool((loaded == number).all())
