"""The world model: pictures to tokens, futures step by step, energies; beside the published code and by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.checkpoint.action_material import ACTION, PUBLISHED, action_run, published_action_dict
from tests.checkpoint.formats_material import model, network_of
from tests.inference.checkpoint import write_checkpoint
from tests.inference.test_clips import image_file
from tests.planning.material import (
    BATCH,
    GRID,
    MEAN,
    PLACES,
    SIZE,
    STD,
    STEPS,
    WIDTH,
    bits_equal,
    drawn,
    frames_of,
    poses,
    write_world,
)
from tests.published import action_inputs, inputs
from tests.published.results import networks, relative
from tests.videos import encoded, picture
from vjepa_scale import load_world_model
from vjepa_scale.checkpoint.consolidate import consolidate
from vjepa_scale.core.errors import UserError
from vjepa_scale.data.poses import advance
from vjepa_scale.model import Encoder
from vjepa_scale.model.predictor import ActionPredictor
from vjepa_scale.planning.world import WorldModel

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# -- pictures --------------------------------------------------------------------------------------


def test_tokens_of_a_picture_are_the_encoders_on_two_of_it(world: WorldModel) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, *SIZE, 3), dtype=np.uint8)
    normalised = (pictures / 255 - np.array(MEAN)) / np.array(STD)
    clips = torch.from_numpy(np.stack([normalised, normalised], axis=1)).float().permute(0, 4, 1, 2, 3)
    with torch.no_grad():
        tokens = world.encoder(clips)
    mean, std = tokens.mean(-1, keepdim=True), tokens.std(-1, keepdim=True, unbiased=False)
    found = world.encode(pictures)
    assert found.shape == (3, PLACES, WIDTH)
    torch.testing.assert_close(found, (tokens - mean) / (std**2 + 1e-5).sqrt(), rtol=0, atol=2e-5)
    torch.testing.assert_close(world.encode(pictures[1]), found[1:2], rtol=0, atol=1e-5)
    torch.testing.assert_close(world.encode(torch.from_numpy(pictures)), found, rtol=0, atol=0)
    assert not found.requires_grad


def test_many_pictures_are_encoded_as_few(world: WorldModel) -> None:
    pictures = np.random.default_rng(1).integers(0, 256, (19, 8, 10, 3), dtype=np.uint8)
    every = world.encode(pictures)
    torch.testing.assert_close(every[[0, 15, 16, 18]], world.encode(pictures[[0, 15, 16, 18]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("aspect", "first", "last"),
    [((1.25, 1.25), 20, 100), ((0.75, 1.35), 17, 103), ((1.0, 2.5), 0, 120), ((2.5, 2.5), 0, 120)],
)
def test_what_is_seen_is_the_crop_of_training(
    tmp_path: Path, aspect: tuple[float, float], first: int, last: int
) -> None:
    """A picture of 64×120: the full height and the middle 80 columns of 1.25, 86 of 1.35; 2.5 has all columns."""
    action = {} if aspect == (0.75, 1.35) else {"crop_aspect": aspect}  # the published one is the default
    world = load_world_model(write_world(tmp_path, action=action))
    assert world.crop_aspect == aspect
    plain = np.random.default_rng(2).integers(0, 256, (64, 120, 3), dtype=np.uint8)
    tokens = world.encode(plain)
    for column in range(0, 120):
        changed = plain.copy()
        changed[20:40, column] = 255 - changed[20:40, column]
        if column in (first - 1, last):
            assert bits_equal(world.encode(changed), tokens), column
        if column in (first, last - 1):
            assert not bits_equal(world.encode(changed), tokens), column
    top = np.concatenate([255 - plain[:1], plain[1:]])
    assert bits_equal(world.encode(top), tokens) == (aspect == (2.5, 2.5))
    box = plain[:, first:last] if aspect != (2.5, 2.5) else plain[8:56]
    squashed = F.interpolate(
        torch.from_numpy(box.copy()).permute(2, 0, 1)[None], size=SIZE, mode="bilinear", antialias=True
    )
    wanted = (squashed[0].float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(world.preprocess(plain)[0], wanted, rtol=0, atol=1e-6)


def test_an_image_file_is_a_picture(world: WorldModel, tmp_path: Path) -> None:
    image_file(tmp_path / "image.png", picture(3), "png", "rgb24")
    torch.testing.assert_close(world.encode(tmp_path / "image.png"), world.encode(picture(3)), rtol=0, atol=0)
    (tmp_path / "video.mp4").write_bytes(encoded(8, rate=8))
    (tmp_path / "notes.txt").write_text("no picture")
    for name, message in (("video.mp4", "not an image"), ("absent.png", "no such file"), ("notes.txt", "notes")):
        with pytest.raises(UserError, match=message):
            world.encode(tmp_path / name)


@pytest.mark.parametrize(
    "pictures",
    [
        np.zeros((4, 8, 3), np.float32),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((8, 8), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((2, 0, 8, 3), np.uint8),
    ],
)
def test_pictures_that_are_none(world: WorldModel, pictures: Any) -> None:
    with pytest.raises(UserError, match=r"encode: pictures of shape .*uint8 RGB"):
        world.encode(pictures)


# -- one step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_camera", [False, True])
def test_no_step_sees_what_is_after_it(world: WorldModel, camera_world: WorldModel, with_camera: bool) -> None:
    """The prediction after k+1 pictures is that of all K pictures at k, whatever the later ones are."""
    model = camera_world if with_camera else world
    frames, (actions, states) = frames_of(), poses()
    camera = drawn(BATCH, STEPS, 6, seed=9) if with_camera else None
    with torch.no_grad():
        every = model.predictor(frames.flatten(1, 2), actions, states, camera, grid=GRID)
    every = F.layer_norm(every.unflatten(1, (STEPS, PLACES)), (WIDTH,))
    inputs_of = {"tokens": frames, "actions": actions, "states": states} | ({"camera": camera} if with_camera else {})
    for k in range(STEPS):
        cut = None if camera is None else camera[:, : k + 1]
        found = model.predict(frames[:, : k + 1], actions[:, : k + 1], states[:, : k + 1], cut)
        torch.testing.assert_close(found, every[:, k], rtol=0, atol=1e-5)
        for name in inputs_of:
            for at in range(STEPS):
                given = {key: value.clone() for key, value in inputs_of.items()}
                given[name][:, at] += 1.0 + drawn(*given[name][:, at].shape, seed=3)
                with torch.no_grad():
                    other = model.predictor(
                        given["tokens"].flatten(1, 2), given["actions"], given["states"], given.get("camera"), grid=GRID
                    )
                step = F.layer_norm(other.unflatten(1, (STEPS, PLACES)), (WIDTH,))[:, k]
                assert bits_equal(step, every[:, k]) == (at > k), (name, at, k)


def test_a_prediction_is_the_networks_of_the_last_picture_normalised(world: WorldModel) -> None:
    frames, (actions, states) = frames_of(steps=3), poses(3)
    with torch.no_grad():
        raw = world.predictor(frames.flatten(1, 2), actions, states, grid=GRID)[:, -PLACES:].numpy()
    wanted = (raw - raw.mean(-1, keepdims=True)) / np.sqrt(raw.var(-1, keepdims=True) + 1e-5)
    found = world.predict(frames, actions, states)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-5)
    assert bits_equal(world.predict(frames.flatten(1, 2), actions.numpy(), states.tolist()), found)


# -- several steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("with_camera", [False, True])
def test_a_rollout_feeds_its_predictions_back(world: WorldModel, camera_world: WorldModel, with_camera: bool) -> None:
    """Beside a loop by hand over the network; and beside one that sees the truth, which is something else."""
    model = camera_world if with_camera else world
    frames, (actions, states) = frames_of(), poses()
    camera = drawn(BATCH, 6, seed=9) if with_camera else None
    found, reached = model.rollout(frames[:, 0], states[:, 0], actions, camera)
    assert (found.shape, reached.shape) == ((BATCH, STEPS, PLACES, WIDTH), (BATCH, STEPS + 1, 7))

    seen, at = [frames[:, 0]], [states[:, 0]]
    with torch.no_grad():
        for k in range(STEPS):
            repeated = None if camera is None else torch.stack([camera] * (k + 1), dim=1)
            raw = model.predictor(
                torch.cat(seen, dim=1), actions[:, : k + 1], torch.stack(at, dim=1), repeated, grid=GRID
            )
            seen.append(F.layer_norm(raw.unflatten(1, (k + 1, PLACES))[:, -1], (WIDTH,)))
            at.append(advance(at[-1], actions[:, k]))
    torch.testing.assert_close(found, torch.stack(seen[1:], dim=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(reached, torch.stack(at, dim=1), rtol=0, atol=0)

    truth = [frames[:, 0], frames[:, 1]]
    repeated = None if camera is None else torch.stack([camera] * 2, dim=1)
    forced = model.predict(torch.stack(truth, dim=1), actions[:, :2], reached[:, :2], repeated)
    assert (forced - found[:, 1]).abs().max() > 0.01


def test_no_step_of_a_rollout_sees_a_later_action(world: WorldModel) -> None:
    frames, (actions, states) = frames_of(), poses()
    found, reached = world.rollout(frames[:, 0], states[:, 0], actions)
    for k in range(STEPS):
        changed = actions.clone()
        changed[:, k] += 0.3
        other, other_reached = world.rollout(frames[:, 0], states[:, 0], changed)
        same = [bits_equal(other[:, step], found[:, step]) for step in range(STEPS)]
        assert same == [step < k for step in range(STEPS)]
        assert bits_equal(other_reached[:, : k + 1], reached[:, : k + 1])
        shorter, _ = world.rollout(frames[:, 0], states[:, 0], actions[:, : k + 1])
        torch.testing.assert_close(shorter, found[:, : k + 1], rtol=0, atol=1e-5)


# -- energies --------------------------------------------------------------------------------------


def test_energies_are_mean_distances(world: WorldModel) -> None:
    tokens, goals = frames_of(1, steps=1)[:, 0], frames_of(2, steps=1)[:, 0]
    wanted = [np.abs(tokens[i].numpy() - goals[i].numpy()).mean() for i in range(BATCH)]
    assert world.energy(tokens, goals).tolist() == pytest.approx(wanted, rel=1e-6)
    one = [np.abs(tokens[i].numpy() - goals[0].numpy()).mean() for i in range(BATCH)]
    assert world.energy(tokens, goals[:1]).tolist() == pytest.approx(one, rel=1e-6)
    assert world.energy(tokens, tokens).tolist() == [0.0, 0.0]


# -- where it comes from ---------------------------------------------------------------------------


def test_every_format_gives_the_same_tokens(tmp_path: Path) -> None:
    tensors = action_run(tmp_path / "run", size=SIZE)
    consolidate(tmp_path / "run/action", tmp_path / "ours")
    consolidate(tmp_path / "run/action", tmp_path / "theirs", to="published")
    pictures = np.random.default_rng(0).integers(0, 256, (BATCH, 36, 64, 3), dtype=np.uint8)
    actions, states = poses()
    config = model(ACTION)
    encoder = Encoder(config).requires_grad_(False)
    encoder.load_state_dict(network_of(tensors, "encoder"))
    predictor = ActionPredictor(config.action_predictor, encoder_width=WIDTH).requires_grad_(False)
    predictor.load_state_dict(network_of(tensors, "action_predictor"))
    for name in ("run", "run/action", "ours", "theirs", "theirs/model.pt"):
        world = load_world_model(tmp_path / name)
        assert (world.size, world.grid) == (SIZE, GRID)
        seen = encoder(world.preprocess(pictures)[:, :, None].repeat(1, 1, 2, 1, 1))
        tokens = F.layer_norm(seen, (WIDTH,))
        next_tokens = F.layer_norm(predictor(tokens, actions[:, :1], states[:, :1], grid=GRID), (WIDTH,))
        assert bits_equal(world.encode(pictures), tokens), name
        assert bits_equal(world.predict(tokens, actions[:, :1], states[:, :1]), next_tokens), name


@pytest.fixture
def foreign(tmp_path: Path) -> WorldModel:
    """A file that the published training could have saved, of 16 pixels."""
    torch.save(published_action_dict(), tmp_path / "ac.pt")
    heads = f"heads={inputs.HEADS},predictor_heads={inputs.ACTION_HEADS}"
    consolidate(tmp_path / "ac.pt", tmp_path / "out", model=heads, size=action_inputs.SIDE, frames=8)
    return load_world_model(tmp_path / "out")


def test_a_published_file_predicts_what_the_published_code_does(foreign: WorldModel) -> None:
    """Teacher forcing, from tests/published/networks.safetensors: all four steps of it."""
    tokens, actions, states, _ = (torch.from_numpy(x) for x in inputs.action_inputs("square"))
    wanted = F.layer_norm(networks()["action_predictor.square"], (inputs.WIDTH,))
    places = action_inputs.CASE.grid[0] * action_inputs.CASE.grid[1]
    for k in range(1, action_inputs.CASE.steps + 1):
        found = foreign.predict(tokens[:, : k * places], actions[:, :k], states[:, :k])
        assert relative(found, wanted[:, (k - 1) * places : k * places]) <= 1e-5


def test_it_imagines_what_the_published_world_model_does(
    foreign: WorldModel, record_property: Callable[[str, object], None]
) -> None:
    """From a picture and a pose, through two actions, as recorded in tests/published/action_rollout.safetensors."""
    theirs = load_file(PUBLISHED / "action_rollout.safetensors")
    tokens = foreign.encode(action_inputs.picture())
    found, states = foreign.rollout(tokens, action_inputs.start()[None], action_inputs.actions()[None])
    differences = {
        "tokens": relative(tokens, theirs["tokens"]),
        "imagined": relative(found, theirs["imagined"]),
        "states": relative(states, theirs["states"]),
    }
    record_property("measured", ", ".join(f"{name} {value:.1e}" for name, value in differences.items()))
    assert max(differences.values()) <= 1e-5
    assert states[0, -1, 6] == 1.0


def test_what_is_no_world_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no action_predictor"):
        load_world_model(write_checkpoint(tmp_path / "encoder"))
    with pytest.raises(UserError, match="no such file or folder"):
        load_world_model(tmp_path / "absent")


# -- input that does not fit -----------------------------------------------------------------------


def test_input_that_does_not_fit(world: WorldModel, camera_world: WorldModel) -> None:
    frames, (actions, states) = frames_of(), poses()
    camera = drawn(BATCH, STEPS, 6)
    first, pose = frames[:, 0], states[:, 0]
    bad = actions.clone()
    bad[0, 0, 0] = float("nan")
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: world.predict(frames[:, :3], actions, states), "predict: tokens of shape .* one action per picture"),
        (lambda: world.predict(frames[..., :40], actions, states), "predict: tokens of shape"),
        (lambda: world.predict(frames, actions[:, :0], states), "predict: tokens of shape"),
        (lambda: world.predict(frames, actions[0], states), "predict: tokens of shape"),
        (lambda: world.predict(frames, actions[..., :6], states), r"predict actions: shape .*\[2, 4, 7\]"),
        (lambda: world.predict(frames, actions, states[:1]), r"predict states: shape .*\[2, 4, 7\]"),
        (lambda: world.predict(frames, bad, states), "predict actions: not all of it are finite"),
        (lambda: world.predict(frames, actions, states, camera), "extrinsics given .*trained without them"),
        (lambda: camera_world.predict(frames, actions, states), "extrinsics missing .*trained with them"),
        (lambda: camera_world.predict(frames, actions, states, camera[:, 0]), "predict extrinsics: shape"),
        (lambda: world.rollout(frames, pose, actions), "rollout tokens: tokens of shape"),
        (lambda: world.rollout(first, pose[0], actions), "rollout state: shape"),
        (lambda: world.rollout(first, pose, actions[:, 0]), "rollout actions: shape"),
        (lambda: world.rollout(first, pose, actions[:, :0]), "rollout actions: shape"),
        (lambda: world.rollout(first[:1], pose, actions), "rollout actions: shape"),
        (lambda: world.rollout(first, pose, actions, camera[:, 0]), "extrinsics given"),
        (lambda: camera_world.rollout(first, pose, actions), "extrinsics missing"),
        (lambda: camera_world.rollout(first, pose, actions, camera), "rollout extrinsics: shape"),
        (lambda: world.energy(first, frames), "energy goal_tokens: tokens of shape"),
        (lambda: world.energy(first, torch.cat([first, first])), "energy goal_tokens: tokens of shape"),
        (lambda: world.energy(first[0], first), "energy tokens: tokens of shape"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()
