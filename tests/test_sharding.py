"""Weights divided among processes: on the device that was asked for."""

import pytest
import torch
import torch.distributed as dist

from parts import sharding


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/meeting")
    yield
    dist.destroy_process_group()


def test_weights_lie_on_the_device_that_was_asked_for_also_beside_a_gpu(group, monkeypatch):
    plain, meshes = sharding.fsdp.fully_shard, []

    def watched(module, **options):
        meshes.append(options["mesh"])  # without one FSDP2 looks for a GPU itself
        return plain(module, **options)

    monkeypatch.setattr(sharding.fsdp, "fully_shard", watched)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    sharding.shard(model, [model[0]], torch.device("cpu"), ())
    assert [mesh.device_type for mesh in meshes] == ["cpu", "cpu"]
    assert all(p.device_mesh.device_type == "cpu" for p in model.parameters())
    assert model(torch.ones(1, 3)).shape == (1, 2)
