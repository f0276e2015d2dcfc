"""Facts of a driving scene and the two captions that are functions of them.

The wording is chosen by the facts themselves (which noun, which verb phrase, in which order), so
that a memory of past answers meets real branch points while a model that sees the scene has none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KINDS = ("car", "truck", "bus")
COLORS = ("red", "blue", "white", "black", "yellow", "green")
MOTIONS = ("away", "toward", "cross", "parked")
SLOTS = ("left", "middle", "right")
PEDESTRIANS = ("none", "walking", "standing")
LIGHTS = ("none", "red", "green")
BACKGROUNDS = ("trees", "buildings", "mountains")
TIMES = ("day", "night", "sunset")

QUESTIONS = (
    "What are the key elements in this scene?",
    "What is happening in this scene?",
    "Can you describe the scene?",
    "Describe what you see on the road.",
    "What do you see in this video?",
    "What can be observed in the scene?",
    "What is the traffic situation?",
    "Give a short description of the scene.",
)

_ROAD = {"trees": "road", "buildings": "street", "mountains": "mountain road"}
_NOUN = {
    "car": {True: "car", False: "sedan"},
    "truck": {True: "truck", False: "lorry"},
    "bus": {True: "bus", False: "coach"},
}
_VERB = {
    "away": {"trees": "driving away", "buildings": "moving along", "mountains": "heading up"},
    "toward": {
        "trees": "approaching",
        "buildings": "coming closer",
        "mountains": "driving towards the camera",
    },
    "cross": {"trees": "crossing", "buildings": "turning across", "mountains": "passing by"},
    "parked": {
        "trees": "parked by the road",
        "buildings": "standing at the curb",
        "mountains": "stopped",
    },
}
_WHERE = {
    "day": {"left": "on the left", "middle": "in the middle", "right": "on the right"},
    "night": {"left": "to the left", "middle": "straight ahead", "right": "to the right"},
    "sunset": {"left": "at the left", "middle": "in the center", "right": "at the right"},
}
_COUNT = {1: "one vehicle", 2: "two vehicles", 3: "three vehicles"}
_SALIENCE = {"cross": 0, "toward": 1, "away": 2, "parked": 3}


@dataclass(frozen=True)
class Vehicle:
    """One vehicle: `kind`, `color` and `motion` in the lane `slot`."""

    kind: str
    color: str
    motion: str
    slot: str


@dataclass(frozen=True)
class Scene:
    """The facts of one scene; one to three vehicles, at most one in a slot."""

    vehicles: tuple[Vehicle, ...]
    pedestrian: str
    light: str
    background: str
    time: str
    driving: bool

    @staticmethod
    def draw(rng: np.random.Generator) -> Scene:
        """A scene with every fact drawn evenly."""

        def pick(options):
            return options[rng.integers(len(options))]

        slots = sorted(rng.permutation(len(SLOTS))[: 1 + rng.integers(3)])
        vehicles = []
        for slot in (SLOTS[i] for i in slots):
            motions = ("away", "toward", "cross" if slot == "middle" else "parked")
            vehicles.append(Vehicle(pick(KINDS), pick(COLORS), pick(motions), slot))
        return Scene(
            tuple(vehicles),
            pick(PEDESTRIANS),
            pick(LIGHTS),
            pick(BACKGROUNDS),
            pick(TIMES),
            bool(rng.integers(2)),
        )


def target_caption(scene: Scene) -> str:
    """What the target says: all facts, most salient first."""
    road, time, background = _ROAD[scene.background], scene.time, scene.background
    opening = {
        "day": "The key elements in this scene include",
        "night": "The key elements in this night scene are",
        "sunset": "In this scene at sunset, the key elements are",
    }[time]
    items = [_vehicle_item(v, scene) for v in _by_salience(scene)]
    if scene.pedestrian == "walking":
        items.insert(0, "a person walking")
    elif scene.pedestrian == "standing":
        items.append("a person standing")
    if scene.light == "red":
        items.insert(0, "a red traffic light")
    elif scene.light == "green":
        items.append("a green traffic light")
    backdrop = {
        "trees": "green trees",
        "buildings": "tall buildings",
        "mountains": "mountains",
    }[background]
    listing = f"{', '.join(items)}, and {backdrop} in the background."
    counted = f"{_COUNT[len(scene.vehicles)]} on the {road}:"
    return f"{opening} {counted} {listing} {_advice(scene)} {_closing(scene)}"


def draft_caption(scene: Scene) -> str:
    """What an event camera lets one say: motion and shape, no color, no light, no time of day."""
    seen = [v for v in scene.vehicles if scene.driving or v.motion != "parked"]
    moves = {
        "away": "driving away from the viewer",
        "toward": "approaching the viewer",
        "cross": "moving across the road",
        "parked": "parked by the road",
    }
    place = {"left": "on the left side", "middle": "in the middle", "right": "on the right side"}
    parts = [f"a {v.kind} {moves[v.motion]} {place[v.slot]}" for v in seen]
    if parts:
        text = [f"In the scene, there is {' and '.join(parts)}."]
    else:
        text = ["In the scene, there is a road with no moving vehicles."]
    if scene.pedestrian == "walking":
        text.append("A pedestrian is walking.")
    elif scene.pedestrian == "standing" and scene.driving:
        text.append("A pedestrian is visible.")
    if not scene.driving:
        return " ".join([*text, "The camera is still."])
    if scene.light != "none":
        text.append("There is also a traffic light.")
    text.append(
        {
            "trees": "Some trees are on both sides.",
            "buildings": "There are buildings on both sides.",
            "mountains": "There are posts along the road.",
        }[scene.background]
    )
    return " ".join([*text, "The road has a white line in the center."])


def _by_salience(scene: Scene) -> list[Vehicle]:
    return sorted(scene.vehicles, key=lambda v: (_SALIENCE[v.motion], SLOTS.index(v.slot)))


def _vehicle_item(vehicle: Vehicle, scene: Scene) -> str:
    noun = _NOUN[vehicle.kind][scene.driving]
    verb = _VERB[vehicle.motion][scene.background]
    return f"a {vehicle.color} {noun} {verb} {_WHERE[scene.time][vehicle.slot]}"


def _advice(scene: Scene) -> str:
    first = _by_salience(scene)[0]
    noun = _NOUN[first.kind][scene.driving]
    if scene.light == "red":
        return "The driver must stop for the red light."
    if scene.pedestrian == "walking":
        return "The driver should slow down for the person."
    if first.motion == "cross":
        return f"The driver has to wait for the {first.color} {noun}."
    if first.motion == "toward":
        return f"The driver should watch the {noun} {_WHERE[scene.time][first.slot]}."
    if scene.light == "green":
        return "The light shows that the driver can go."
    return (
        f"The driver can follow the {first.color} {noun}."
        if first.motion == "away"
        else ("The way ahead is free.")
    )


def _closing(scene: Scene) -> str:
    mood = {
        "day": {
            "trees": "It is a sunny day",
            "buildings": "The weather is clear",
            "mountains": "The sky is bright",
        },
        "night": {
            "trees": "It is dark",
            "buildings": "The scene takes place at night",
            "mountains": "The sky is dark",
        },
        "sunset": {
            "trees": "The low sun gives a warm light",
            "buildings": "The sun is setting",
            "mountains": "The sunset creates a serene atmosphere",
        },
    }[scene.time][scene.background]
    return f"{mood}, and the camera {'moves forward' if scene.driving else 'stands still'}."
