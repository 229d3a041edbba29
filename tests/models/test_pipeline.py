import pytest
import torch

import openvsa


def test_same_seed_same_bits_and_another_seed_another_clip(tiny_pipeline):
    first = tiny_pipeline(scene="bird-song", seed=3, num_inference_steps=3)
    torch.randn(10)
    again = tiny_pipeline(scene="bird-song", seed=3, num_inference_steps=3)
    other = tiny_pipeline(scene="bird-song", seed=4, num_inference_steps=3)
    assert first.shape == (tiny_pipeline.num_frames, 16, 32, 3)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_clip_begins_with_its_start_frame(tiny_pipeline):
    scene = tiny_pipeline.find_scene("butterfly")
    clip = tiny_pipeline(scene="butterfly", num_inference_steps=1)
    assert torch.equal(clip[0], scene.start_frame((16, 32)))
    image = torch.randint(0, 256, (16, 32, 3), dtype=torch.uint8)
    assert torch.equal(tiny_pipeline(image=image, num_inference_steps=1)[0], image)


def test_the_shot_makes_a_difference(tiny_pipeline):
    scene = tiny_pipeline.find_scene("butterfly")
    told = tiny_pipeline(scene="butterfly", num_inference_steps=2)
    untold = tiny_pipeline(image=scene.start_frame((16, 32)), num_inference_steps=2)
    assert not torch.equal(told, untold)


def test_callback_sees_every_step(tiny_pipeline):
    seen = []
    tiny_pipeline(
        scene="glide",
        num_inference_steps=3,
        callback_on_step_end=lambda pipe, step, timestep, kwargs: seen.append(
            (step, float(timestep), kwargs["latents"].shape)
        ),
    )
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [time for _, time, _ in seen] == sorted((time for _, time, _ in seen), reverse=True)
    assert {shape for _, _, shape in seen} == {(1, 8, 2, 2, 4)}


def test_sparse_attention_at_density_one_changes_nothing_visible(tiny_pipeline):
    dense = tiny_pipeline(scene="glide", num_inference_steps=2)
    handle = openvsa.sparsify(tiny_pipeline, density=1.0)
    full = tiny_pipeline(scene="glide", num_inference_steps=2)
    handle.detach()
    assert (full.int() - dense.int()).abs().max() <= 1
    assert torch.equal(tiny_pipeline(scene="glide", num_inference_steps=2), dense)


def test_bad_requests_are_named(tiny_pipeline):
    with pytest.raises(openvsa.OpenVSAError, match="no scene 'bird'; choose one of: squirrels, bird-song"):
        tiny_pipeline(scene="bird")
    with pytest.raises(openvsa.OpenVSAError, match="not both or neither"):
        tiny_pipeline()
    with pytest.raises(openvsa.OpenVSAError, match="at least one step, got 0"):
        tiny_pipeline(scene="glide", num_inference_steps=0)
    with pytest.raises(openvsa.ShapeError, match=r"uint8 tensor \[16, 32, 3\], got torch.float32 \[16, 32, 3\]"):
        tiny_pipeline(image=torch.zeros(16, 32, 3))
