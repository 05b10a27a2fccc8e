"""The toy set: seeded drawings of varied hands over cluttered desks, each with its exact mask of skin."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from support.checkpoints import new_file

S = 3  # everything is drawn S times too large, then shrunk: that is the anti-aliasing
# In the plane, a point is a complex number, x + y * 1j, with y pointing down; multiplying by exp(1j * a) turns it by a.
SKINS = np.array([(62, 37, 27), (94, 58, 41), (134, 87, 63), (174, 115, 86),
                  (208, 147, 115), (232, 174, 146), (247, 202, 178)])
FINGERS = [(-.33-.95j, -.17, .8, .132), (-.11-1.02j, -.04, .9, .136),
           (.12-.98j, .08, .83, .13), (.33-.86j, .22, .65, .112)]
PALM_LINES = (-.45-.72j, -.2-.6j, .1-.55j, .25-.4j), (.45-.7j, .15-.74j, -.1-.9j), (-.42-.7j, -.14-.5j, -.08-.15j)
ROUND = {"stick": (3, 45, 1, 0), "pen": (1.8, 42, 1, 0), "capsule": (5, 14, 2, .2), "ball": (10, 0, 1, 0),
         "cable": (1.2, 14, 12, .35), "cup": (2.3, 6, 16, 0)}  # radius, length of a piece, pieces, how much they wind
FLAT = {"paper": (64, 86, 1, 17, .85, .25, (236, 234, 226)), "keyboard": (112, 38, 14, 4, .8, .75, (70, 72, 76)),
        "phone": (30, 58, 1, 1, .92, .9, (48, 48, 54)), "ruler": (112, 12, 40, 1, .15, .6, (212, 170, 116)),
        "book": (60, 80, 1, 2, .6, .2, None), "envelope": (70, 46, 1, 2, 1, .95, (232, 196, 156))}
# width, height, then a grid of marks (columns, rows, how much of its cell a mark fills, across and down), colour

def pick_colour(rng, skin=0.):
    """A skin tone with probability `skin`, so that colour alone does not reveal a hand; else a colour no skin has."""
    t, i = np.modf(rng.uniform(0, len(SKINS) - 1))
    tone = (SKINS[int(i)] * (1 - t) + SKINS[int(i) + 1] * t) * rng.uniform(.95, 1.05, 3)
    other = rng.uniform(30, 210) + rng.uniform(-60, 60, 3)
    if other[0] == max(other):  # skin is red before all
        other = other[::-1]
    return tone if rng.random() < skin else other

def noise(rng, size, across, down):
    """Smooth noise in -1..1: a coarse random grid, stretched to `size`."""
    grid = rng.uniform(-1, 1, (down, across)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize(size, Image.BILINEAR))

def draw_desk(rng, size):
    colour, tone = pick_colour(rng), 1 + .08 * noise(rng, size, 4, 3)
    if rng.random() < .3:  # bleached wood
        colour = np.array((120, 124, 122)) * rng.uniform(.6, 1.5)
        rings = np.sin(noise(rng, size, 6, 14) * rng.uniform(15, 40))
        tone = tone + .05 * rings + .06 * noise(rng, size, 8, 120) + .03 * noise(rng, size, 20, 60)
    else:  # from smooth to coarse cloth
        threads = noise(rng, size, 160, 120) + .5 * np.sin(np.arange(size[0]) * rng.uniform(.5, 1.2))
        tone = tone + rng.choice((0, .04, .08)) * threads
    return Image.fromarray((colour * tone[..., None]).clip(0, 255).astype(np.uint8))

def cast_shadow(canvas, mask, light, lift):
    """Darken what lies beside `mask`, away from the light; the further above the desk, the softer and longer."""
    moved = (S, 0, lift * S * light.real, 0, S, lift * S * light.imag)
    soft = mask.transform((canvas.width // S, canvas.height // S), Image.AFFINE, moved)
    soft = soft.filter(ImageFilter.GaussianBlur(.4 * lift)).point(lambda v: v * .5)
    x0, y0, x1, y1 = box = soft.getbbox() or (0, 0, 1, 1)
    canvas.paste((18, 14, 16), (x0 * S, y0 * S), soft.crop(box).resize(((x1 - x0) * S, (y1 - y0) * S), Image.BILINEAR))

def sculpt(canvas, limbs, colour, light, lift=2., detail=1., flat=False):
    """Paint round limbs (end, end, radius, radius, height, height), lit by their slope; return the mask they cover."""
    height = np.zeros(canvas.size[::-1], np.float32)
    for a, b, *sizes in limbs:
        (ra, rb, za, zb), d, r = np.float32(sizes), np.complex64(b - a), max(sizes[:2])
        x0, x1 = np.clip((min(a.real, b.real) - r, max(a.real, b.real) + r + 1), 0, canvas.width).astype(int)
        y0, y1 = np.clip((min(a.imag, b.imag) - r, max(a.imag, b.imag) + r + 1), 0, canvas.height).astype(int)
        y, x = (v.astype(np.float32) for v in np.ogrid[y0 - a.imag:y1 - a.imag - .5, x0 - a.real:x1 - a.real - .5])
        along = (x * d.real + y * d.imag) / max(abs(d) ** 2, np.float32(1e-6))
        t = along.clip(0, 1)  # where on the bone the nearest point is
        rise = (ra + (rb - ra) * t) ** 2 - (x - t * d.real) ** 2 - (y - t * d.imag) ** 2
        dome = np.where((rise > 0) & ((along == t) | (not flat)), za + (zb - za) * t + np.sqrt(rise.clip(0)), 0)
        np.maximum(height[y0:y1, x0:x1], dome, out=height[y0:y1, x0:x1])
    mask = Image.fromarray(height > 0).convert("L")
    cast_shadow(canvas, mask, light, lift)
    x0, y0, x1, y1 = np.clip(np.add(mask.getbbox() or 0, (-2, -2, 2, 2)), 0, canvas.size * 2).tolist()
    detail, height = (np.broadcast_to(v, height.shape)[y0:y1, x0:x1] for v in (detail, height))
    smooth = Image.fromarray(height).reduce(2).resize((x1 - x0, y1 - y0), Image.BILINEAR)
    gy, gx = (g.clip(-2, 2) for g in np.gradient(np.asarray(smooth)))
    lit = (.83 - gx * light.real - gy * light.imag).clip(0) / np.sqrt(1 + gx ** 2 + gy ** 2)
    valley = (np.gradient(gx, axis=1) + np.gradient(gy, axis=0)).clip(0, .6) * .5  # less light gets between fingers
    shade = ((.42 + .66 * lit - valley) * detail).clip(0).astype(np.float32)[..., None]
    paint = colour * shade ** np.array((.75, 1, 1.1), np.float32)  # skin in the shade is redder
    canvas.paste(Image.fromarray(paint.clip(0, 255).astype(np.uint8)), (x0, y0), mask.crop((x0, y0, x1, y1)))
    return mask

def xy(points):
    return [(p.real, p.imag) for p in points]

def draw_object(rng, canvas, light, kind, at, skin=0.):
    """Put a thing of one of the ROUND or FLAT kinds near `at`; return the mask of what it covers."""
    size, turn, colour = rng.uniform(.8, 1.2) * S, rng.uniform(0, 2 * np.pi), pick_colour(rng, skin)
    if kind in ROUND:
        (radius, length, pieces, wind), step = ROUND[kind], np.pi / 8 if kind == "cup" else 0
        turns = turn + np.cumsum(rng.normal(step, wind, pieces))
        points = at + size * length * np.cumsum([0, *np.exp(1j * turns)])
        limbs = [(a, b, radius * size, radius * size, 0, 0) for a, b in zip(points, points[1:])]
        if kind == "cup":
            middle, drink = points[1:].mean(), rng.choice([(46, 38, 42), (60, 110, 60), (200, 200, 205)])
            sculpt(canvas, [(middle, middle, 15 * size, 15 * size, 0, 0)], drink, light, 5)
            limbs.append((points[0], 1.6 * points[0] - .6 * middle, 2.5 * size, 2.5 * size, 0, 0))  # its handle
        return sculpt(canvas, limbs, colour, light, min(radius, 3))
    width, height, columns, rows, wide, high, usual = FLAT[kind]
    colour, mask = np.array(usual or colour) * rng.uniform(.85, 1.05), Image.new("L", canvas.size)
    def corners(x, y, w, h):  # of a rectangle around (x, y), where the object spans -.5 to .5
        across, down = (x + w * np.array((-.5, .5, .5, -.5))) * width, (y + h * np.array((-.5, -.5, .5, .5))) * height
        return xy(at + size * np.exp(1j * turn) * (across + 1j * down))
    ImageDraw.Draw(mask).polygon(corners(0, 0, 1, 1), fill=255)
    cast_shadow(canvas, mask, light, 1.5)
    canvas.paste(tuple(colour.clip(0, 255).astype(int)), mask=mask)
    ink = tuple((colour * rng.choice((.35, .55, .75))).clip(0, 255).astype(int))
    for x, y in np.ndindex(columns, rows):
        mark = ((x + .5) / columns - .5, (y + .5) / rows - .5, wide / columns * rng.uniform(.9, 1), high / rows)
        ImageDraw.Draw(canvas).polygon(corners(*mark), fill=ink)
    return mask

def draw_hand(rng, canvas, mask, skin, light, wrist, angle, scale, flip):
    """Lay out bones in units of the palm's width, wrist at 0, fingers up (-1j), and add their skin to `mask`."""
    palm_up, limbs, detail = rng.random() < .35, [], Image.new("L", canvas.size, 128)
    pencil, creases = ImageDraw.Draw(detail), list(PALM_LINES * palm_up)
    def place(p):
        return wrist + scale * np.exp(1j * angle) * (np.real(p) * flip + 1j * np.imag(p))
    def bone(a, b, ra, rb, za=0., zb=0.):
        return place(a), place(b), ra * scale, rb * scale, (1 + za) * scale, (1 + zb) * scale
    def finger(base, heading, curl, lengths, radius, z=0.):
        for length, pitch in zip(lengths, (.4 * curl, curl, 1.45 * curl)):
            across, ahead = np.exp(1j * heading) * radius, -1j * np.exp(1j * heading) * np.cos(pitch) * length
            end, z_end = base + ahead, z + np.sin(pitch) * length * (1 if palm_up else -.5)
            limbs.append(bone(base, end, radius, radius * .93, z, z_end))
            if pitch != .4 * curl and curl < 1:
                creases.append([base - .7 * across, base + .7 * across])
            base, z, radius, heading = end, z_end, radius * .93, heading * .85 + rng.normal(0, .05)
        if not palm_up and np.cos(pitch) > .5:
            nail = [end + ahead * (.1 + .34 * np.sin(t)) + across * .6 * np.cos(t) for t in np.arange(0, 6.3, .5)]
            pencil.polygon(xy(place(nail)), fill=152, outline=118)
    spread, folded = rng.uniform(1, 1.8), 1.5 * (np.arange(4) >= rng.integers(4))  # a fist, or 1 to 3 fingers up
    curls = (rng.normal(0, .12, 4) + (rng.uniform(0, .8) if rng.random() < .65 else folded)).clip(.01)  # in radians
    for (knuckle, heading, length, radius), beside, curl in zip(FINGERS, FINGERS[1:] + FINGERS[2:3], curls):
        web = (knuckle + beside[0]) / 2  # a bone's worth of flesh between the bones keeps the hand from being a rake
        limbs += [bone(k.real * .5 - .12j, k, .24, r, -.1, z) for k, r, z in ((knuckle, .15, -.02), (web, .14, -.03))]
        finger(knuckle, heading * spread, curl, length * np.array((.45, .3, .25)), radius)
    finger(-.46 - .5j, -rng.uniform(.25, .95), rng.uniform(.01, .5), (.36, .28), .15, .03)  # the thumb
    for line in creases:
        pencil.line(xy(place(line)), fill=108, width=int(.03 * scale), joint="curve")
    if palm_up:
        skin = skin * .75 + np.array((235, 165, 140)) * .25
    elbow = 9 * np.exp(1j * (np.pi / 2 + rng.normal(0, .25)))
    limbs += [bone(-.18 - .15j, -.46 - .5j, .22, .17, -.05, .03), bone(0, elbow / 3, .27, .42, -.13, -.12),
              bone(elbow / 3, elbow, .42, .46, -.12, -.12)]
    grain = np.asarray(detail.filter(ImageFilter.BoxBlur(S * .5))) / 128 + .03 * noise(rng, canvas.size, 40, 30)
    mask.paste(255, mask=sculpt(canvas, limbs, skin, light, 5, grain))
    if rng.random() < .65:
        cuff, r, folds = elbow * rng.uniform(.02, .22), rng.uniform(.4, .47), 1 + .1 * noise(rng, canvas.size, 25, 25)
        sleeve = [bone(cuff, elbow, r, .62), bone(cuff, cuff + elbow * .02, r + .05, r + .05)]
        mask.paste(0, mask=sculpt(canvas, sleeve, pick_colour(rng, .05), light, 3, folds, flat=True))

def camera(rng, photo, light):
    """What a lens and a sensor add: uneven light, vignette, white balance, exposure, blur and noise."""
    pixels = np.asarray(photo.filter(ImageFilter.GaussianBlur(rng.uniform(.1, .7)))) / 255
    y, x = np.mgrid[-1:1:photo.height * 1j, -1:1:photo.width * 1j]
    lamp = (1 + rng.uniform(.1, .5) * (x * light.real + y * light.imag)) * (1 - rng.uniform(.02, .13) * (x * x + y * y))
    warmth, grain = rng.uniform(-.07, .07), rng.normal(0, rng.uniform(.004, .014), (*x.shape, 1))
    pixels = pixels * (lamp * rng.uniform(.85, 1.25))[..., None] * (1 + warmth, 1, 1 - warmth)
    pixels = pixels.clip(0, 1) ** rng.uniform(.8, 1.2) + grain + rng.normal(0, .006, pixels.shape)
    return Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))

def draw_hand_photo(rng, width=160, height=120, move=0j, turn=0.):
    """Return a photograph (RGB) of one or two hands over a cluttered desk, and the mask (L, 0 or 255) of its skin.

    The same rng with another `move` (in widths) or `turn` (in radians) moves the hand over the same desk: a video."""
    size, light = (width * S, height * S), .55 * np.exp(1j * rng.uniform(0, 2 * np.pi))
    canvas, mask = draw_desk(rng, size), Image.new("L", size)
    def somewhere(margin=0.):
        return complex(*rng.uniform(margin, 1 - margin, 2) * size)
    kinds, tricky = [kind for kind in [*ROUND, *FLAT] if kind not in ("ruler", "envelope")], rng.random() < .25
    for kind in rng.choice([*ROUND, "ruler", "envelope"] if tricky else kinds, rng.integers(3, 8)):
        draw_object(rng, canvas, light, kind, somewhere(), .6 * tricky)
    skin, two, side = pick_colour(rng, 1), rng.random() < .15, rng.choice(4, p=(.5, .2, .1, .2)) * np.pi / 2
    for flip in (1, -1) if two else rng.choice((-1, 1), 1):
        angle = side + rng.uniform(-.5, .5)
        scale = rng.uniform(42, 60) * S * min(width / 160, height / 120) * (.75 if two else 1)
        apart = flip * .26 * two * complex(np.cos(side) * size[0], np.sin(side) * size[1])
        wrist = somewhere(.3) + apart + .9j * scale * np.exp(1j * angle) + move * size[0]
        draw_hand(rng, canvas, mask, skin, light, wrist, angle + turn, scale, flip)
    if rng.random() < .12:  # something thin lies over the hand, or near it
        kind = rng.choice(["pen", "stick", "cable"])
        mask.paste(0, mask=draw_object(rng, canvas, light, kind, somewhere(.2)))
    return camera(rng, canvas.reduce(S), light), mask.reduce(S).point(lambda v: 255 * (v > 127))

def draw_set(folder, count=240, seed=0):
    """images/, masks/ and the lists of a 70/15/15 split; each photo has a generator of its own."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    names = [f"{i:03d}" for i in range(count)]
    cuts = 0, round(0.7 * count), round(0.85 * count), count  # lists first: a drawing that was stopped is noticed
    for split, a, b in zip(("train", "val", "test"), cuts, cuts[1:]):
        (folder / f"{split}.txt").write_text("\n".join(names[a:b]) + "\n")
    for i, name in enumerate(names):
        photo, mask = draw_hand_photo(np.random.default_rng([seed, i]))
        with new_file(folder / "images" / f"{name}.jpg") as file:
            photo.save(file, "JPEG", quality=90)
        with new_file(folder / "masks" / f"{name}.png") as file:
            mask.save(file, "PNG")
