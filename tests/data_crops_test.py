"""Crops of photographs, on ramps whose grey values say where a pixel comes from."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from ffl_jax import deployment
from ffl_jax.data import crops, images


def ramp(width, height):
    """Red rises by one from column to column, green from row to row, from 20 on."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[..., 1] = 20 + np.arange(width), 20 + np.arange(height)[:, None]
    return image


def encode(array, file_format="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, file_format, **options)
    return buffer.getvalue()


def resized(begin, end, size):
    """Values of a ramp's [begin, end) brought to `size` pixels: at the centres of the new pixels."""
    return 20 + begin + (np.arange(size) + 0.5) * (end - begin) / size - 0.5


def assert_ramp(image, box, tolerance, flipped=False):
    left, top, right, bottom = box
    columns, rows = resized(left, right, image.shape[1]), resized(top, bottom, image.shape[0])
    image = image[:, ::-1].astype(float) if flipped else image.astype(float)
    # At the border there is less to average over, which bends the ramp.
    inside = slice(2, -2)
    assert np.abs(image[..., 0] - columns)[inside, inside].max() <= tolerance
    assert np.abs(image[..., 1] - rows[:, None])[inside, inside].max() <= tolerance


def generator(seed):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("shape", [(200, 150), (150, 220), (90, 90)])
def test_a_crop_is_the_drawn_box_resized_and_half_are_flipped(shape):
    encoded, flips = encode(ramp(*shape)), 0
    for seed in range(40):
        (image,) = crops.random_resized(encoded, 48, [generator(seed)], flip=True)
        box = crops.draw_box(generator(seed), *shape)
        flipped = bool(image[24, 0, 0] > image[24, -1, 0])
        assert_ramp(image, box, 1.0, flipped)
        flips += flipped
    assert 10 <= flips <= 30  # of 40, at 1/2: mean 20, standard deviation 3.2
    for seed in range(8):
        (image,) = crops.random_resized(encoded, 48, [generator(seed)], flip=False)
        assert image[24, 0, 0] < image[24, -1, 0]


def test_views_are_drawn_apart():
    encoded = encode(ramp(120, 100))
    views = crops.random_resized(encoded, 32, [generator(0), generator(1), generator(0)], flip=True)
    assert views.shape == (3, 32, 32, 3)
    assert views.dtype == np.uint8
    np.testing.assert_array_equal(views[0], views[2])
    np.testing.assert_array_equal(views[1], crops.random_resized(encoded, 32, [generator(1)], flip=True)[0])
    assert not np.array_equal(views[0], views[1])


def test_boxes_have_the_areas_and_ratios_of_the_paper():
    """8 % to 100 % of the area, 3:4 to 4:3; on a square, areas that fit are as frequent as they are drawn."""
    width = height = 1000
    boxes = np.array([crops.draw_box(generator(seed), width, height) for seed in range(2000)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert boxes.max() <= 1000
    areas, ratios = widths * heights / 1e6, widths / heights
    assert 0.0795 < areas.min() < 0.09
    assert 0.95 < areas.max() <= 1
    assert 0.745 < ratios.min() < 0.76
    assert 1.31 < ratios.max() < 1.342
    assert abs(np.log(ratios).mean()) < 4 * math.log(4 / 3) / math.sqrt(3 * 2000)  # uniform in the logarithm
    # Any ratio fits below 3/4 of the area, so that there P(a < 0.41) / P(a < 0.74) = 0.33 / 0.66.
    assert abs((areas < 0.41).sum() / (areas < 0.74).sum() - 0.5) < 4 * 0.5 / math.sqrt(1200)
    # Left edges spread over all places: on average half of what is free.
    free = widths < 1000
    assert abs((boxes[free, 0] / (1000 - widths[free])).mean() - 0.5) < 4 / math.sqrt(12 * 1900)
    assert abs((boxes[:, 1] / np.maximum(1000 - heights, 1)).mean() - 0.5) < 0.05


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        # No draw of at least 8 % fits into a 100:1 image: 13 = round(10 * 4 / 3) columns of the middle.
        ((1000, 10), (493, 0, 506, 10)),
        ((10, 1000), (0, 493, 10, 506)),
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_an_image_that_no_box_fits_into_gives_its_middle(shape, box):
    assert crops.draw_box(generator(0), *shape) == box


def test_large_jpegs_are_decoded_at_a_fraction_of_their_size(monkeypatch):
    """By the largest divisor that leaves as many pixels as are asked for, and nothing moves by it."""
    sizes, to_rgb = [], images.to_rgb

    def spy(opened, *given):
        image = to_rgb(opened, *given)
        sizes.append(image.size)
        return image

    monkeypatch.setattr(images, "to_rgb", spy)
    shape = (220, 180)
    encoded = encode(ramp(*shape), "JPEG", quality=100, subsampling=0)
    for seed in range(30):
        (image,) = crops.random_resized(encoded, 20, [generator(seed)], flip=False)
        left, top, right, bottom = box = crops.draw_box(generator(seed), *shape)
        smallest = min(right - left, bottom - top)
        divisor = 8 if smallest >= 160 else 4 if smallest >= 80 else 2 if smallest >= 40 else 1
        assert sizes[-1] == (math.ceil(220 / divisor), math.ceil(180 / divisor))
        # Box edges fall onto whole pixels of the smaller image: at most half of one away.
        assert_ramp(image, box, 1.5 + divisor / 2)
    assert len({size for size in sizes}) >= 3
    encoded = encode(ramp(*shape))
    crops.random_resized(encoded, 20, [generator(0)], flip=False)
    assert sizes[-1] == shape  # a PNG file has one size only


def test_a_turned_jpeg_is_cropped_upright():
    """Orientation 6, a quarter turn clockwise: the stored rows become columns, from right to left."""
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = ramp(136, 200)
    stored = np.rot90(upright)  # counterclockwise
    encoded = encode(stored, "JPEG", quality=100, subsampling=0, exif=exif)
    # At full size, where the JPEG itself is off by 3, and at a quarter.
    for size, tolerance in ((60, 3), (30, 4)):
        (image,) = crops.random_resized(encoded, size, [generator(4)], flip=False)
        assert_ramp(image, crops.draw_box(generator(4), 136, 200), tolerance)


@pytest.mark.parametrize(
    ("shape", "size", "box"),
    [
        # 128 = 112 * 256 / 224. Shorter side 128 -> as stored; 16 and 8 pixels cut off in the middle.
        ((144, 128), 112, (16, 8, 128, 120)),
        ((128, 144), 112, (8, 16, 120, 128)),
        # 64 -> 128: 2 pixels for each; of 192 x 128 the columns 40 .. 152 and rows 8 .. 120.
        ((96, 64), 112, (20, 4, 76, 60)),
        # 73 = round(64 * 256 / 224); 151 x 146 -> 75 x 73, the columns round(5.5) = 6 .. 70, rows 4 .. 68.
        ((151, 146), 64, (6 * 151 / 75, 8, 70 * 151 / 75, 136)),
    ],
)
def test_evaluation_sees_the_centre(shape, size, box):
    image = crops.evaluation_image(encode(ramp(*shape)), "resized", size)
    assert image.shape == (size, size, 3)
    assert_ramp(image, box, 1.0)


def test_evaluation_of_padded_crops_sees_what_training_pads():
    encoded = encode(ramp(60, 40))
    np.testing.assert_array_equal(
        crops.evaluation_image(encoded, "pad", 20), images.decode_image(encoded, image_size=20)
    )


@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_greys_of_12_bits_are_scaled_as_in_training(crop):
    """Wherever a file is read: for training, for evaluation, and by what was exported."""
    encoded = encode(np.full((30, 30), 2048, np.uint16), "PNG")
    card = {"class_names": ["a", "b"], "image_size": [20, 20], "crop": crop}
    # value * 255 / 65535 and / 4095, rounded by hand
    for given, expected in (((), 8), ((4095,), 128)):
        assert (crops.evaluation_image(encoded, crop, 20, *given) == expected).all()
        generators = [np.random.default_rng(0)]
        assert (crops.random_resized(encoded, 20, generators, False, *given) == expected).all()
        more = dict(zip(("max_value",), given, strict=False))
        model = deployment.Model(card | more, "onnx", run=None, device="cpu")
        assert (model.read_image(encoded) == expected).all()
