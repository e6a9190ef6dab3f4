"""Workflows as ComfyUI_ExtraModels and ComfyUI-Lightning leave them, laid out after the public ones and with texts of our own."""

MODEL, TEXT_ENCODER, AUTOENCODER = (
    "Efficient-Large-Model/Sana_1600M_1024px",
    "Efficient-Large-Model/gemma-2-2b-it",
    "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers",
)
PACK = {"cnr_id": "ComfyUI_ExtraModels", "ver": "92f556ed4d3bec1a3f16117d2de10f195c36d68e"}
CORE = {"cnr_id": "comfy-core", "ver": "0.3.27"}
PLACES = {  # px, of nodes by their ids; some lie close together, as where people have worked
    1: (490, 690),
    2: (470, 1070),
    3: (480, 870),
    4: (890, 755),
    5: (830, 1020),
    6: (830, 1275),
    7: (1270, 595),
    8: (1275, 1020),
    9: (1640, 605),
    10: (1660, 730),
    11: (890, 610),
    12: (1270, 500),
}

SIZES = {  # px
    "SanaCheckpointLoader": (315, 130),
    "SanaTextEncode": (400, 200),
    "GemmaTextEncode": (400, 200),
    "KSampler": (315, 262),
    "VAEDecode": (200, 50),
    "PreviewImage": (514, 599),
    "Reroute": (75, 26),
}


def node(number: int, kind: str, values: list, inputs: dict, outputs: dict, **more: object) -> dict:
    """One node. inputs: by name type and link; those that end with "*" belong to a widget. outputs: by name type and links."""
    return {
        "id": number,
        "type": kind,
        "pos": list(PLACES[number]),
        "size": list(SIZES.get(kind, (315, 106))),
        "flags": {},
        "order": number,
        "mode": 0,
        "inputs": [
            {"name": name.strip("*"), "type": of, "link": link}
            | ({"widget": {"name": name.strip("*")}} if name.endswith("*") else {})
            for name, (of, link) in inputs.items()
        ],
        "outputs": [{"name": name, "type": of, "links": links} for name, (of, links) in outputs.items()],
        "properties": {"Node name for S&R": kind}
        | (CORE if kind in ("VAEDecode", "KSampler", "PreviewImage") else PACK),
        "widgets_values": values,
    } | more


def workflow(nodes: list[dict], links: list[list], **more: object) -> dict:
    return {
        "version": 0.4,
        "last_node_id": max(found["id"] for found in nodes),
        "last_link_id": max((link[0] for link in links), default=0),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {"ds": {"scale": 0.6, "offset": [-400, -300]}, "frontendVersion": "1.21.6"},
    } | more


def text_to_image(sampler: str = "euler") -> dict:
    """28 steps of a 1.6B; scm: two steps of Sprint. A size from the list of ratios, and the size as a condition."""
    sprint = sampler == "scm"
    model, config = (
        ("Efficient-Large-Model/Sana_Sprint_1.6B_1024px", "SanaSprint_1600M_P1_D20")
        if sprint
        else (MODEL, "SanaMS_1600M_P1_D20")
    )
    nodes = [
        node(1, "SanaCheckpointLoader", [model, config, "FP32", True], {}, {"model": ("MODEL", [28])}),
        node(2, "GemmaLoader", [TEXT_ENCODER, "cuda", "BF16"], {}, {"GEMMA": ("GEMMA", [10, 11])}),
        node(3, "SanaResolutionSelect", ["512px", "1.46"], {}, {"width": ("INT", [7, 40]), "height": ("INT", [8, 41])}),
        node(
            4,
            "EmptySanaLatentImage",
            [512, 512, 1],
            {"width*": ("INT", 7), "height*": ("INT", 8)},
            {"LATENT": ("LATENT", [33])},
        ),
        node(
            5,
            "SanaTextEncode",
            ["a red circle"],
            {"GEMMA": ("GEMMA", 11)},
            {"CONDITIONING": ("CONDITIONING", [31])},
            title="What I want",
        ),
        node(6, "GemmaTextEncode", ["blurry"], {"GEMMA": ("GEMMA", 10)}, {"CONDITIONING": ("CONDITIONING", [36])}),
        node(
            7,
            "KSampler",
            [763443243300024, "fixed", 2 if sprint else 28, 1 if sprint else 2, sampler, "normal", 1],
            {
                "model": ("MODEL", 29 if sprint else 28),
                "positive": ("CONDITIONING", 37),
                "negative": ("CONDITIONING", 36),
                "latent_image": ("LATENT", 33),
            },
            {"LATENT": ("LATENT", [34])},
        ),
        node(8, "ExtraVAELoader", [AUTOENCODER, "dcae-f32c32-sana-1.0-diffusers", "FP32"], {}, {"VAE": ("VAE", [2])}),
        node(9, "VAEDecode", [], {"samples": ("LATENT", 34), "vae": ("VAE", 2)}, {"IMAGE": ("IMAGE", [38])}),
        node(10, "PreviewImage", [], {"images": ("IMAGE", 38)}, {}),
        node(
            12,
            "SanaResolutionCond",
            [1024, 1024],
            {"cond": ("CONDITIONING", 31), "width*": ("INT", 40), "height*": ("INT", 41)},
            {"cond": ("CONDITIONING", [37])},
        ),
    ]
    links = [
        [2, 8, 0, 9, 1, "VAE"],
        [7, 3, 0, 4, 0, "INT"],
        [8, 3, 1, 4, 1, "INT"],
        [10, 2, 0, 6, 0, "GEMMA"],
        [11, 2, 0, 5, 0, "GEMMA"],
        [28, 1, 0, 11 if sprint else 7, 0, "MODEL"],
        [31, 5, 0, 12, 0, "CONDITIONING"],
        [33, 4, 0, 7, 3, "LATENT"],
        [34, 7, 0, 9, 0, "LATENT"],
        [36, 6, 0, 7, 2, "CONDITIONING"],
        [37, 12, 0, 7, 1, "CONDITIONING"],
        [38, 9, 0, 10, 0, "IMAGE"],
        [40, 3, 0, 12, 1, "INT"],
        [41, 3, 1, 12, 2, "INT"],
    ]
    if sprint:
        nodes.append(node(11, "ScmModelSampling", [5.0, False], {"model": ("MODEL", 28)}, {"MODEL": ("MODEL", [29])}))
        links.append([29, 11, 0, 7, 0, "MODEL"])
    return workflow(nodes, links)


def in_a_subgraph() -> dict:
    """The prompt and the sampler in a subgraph, the loaders outside, a reroute between, a group around and a wire with a bend."""
    inner = "a5f2c7e0-2c7b-4c38-9f0e-3a3b6f4c9d01"
    whole = text_to_image()
    nodes = {found["id"]: found for found in whole["nodes"]}
    inside = [nodes[5], nodes[7]]
    nodes[5]["outputs"][0]["links"], nodes[7]["outputs"][0]["links"] = [3], [5]
    for name, link in (("positive", 3), ("negative", 7), ("latent_image", 6), ("model", 1)):
        next(found for found in nodes[7]["inputs"] if found["name"] == name)["link"] = link
    nodes[5]["inputs"][0]["link"] = 2
    ends = {
        1: (-10, 0, 7, 0, "MODEL"),
        2: (-10, 1, 5, 0, "GEMMA"),
        3: (5, 0, 7, 1, "CONDITIONING"),
        5: (7, 0, -20, 0, "LATENT"),
        6: (-10, 2, 7, 3, "LATENT"),
        7: (-10, 3, 7, 2, "CONDITIONING"),
    }
    fields = ("origin_id", "origin_slot", "target_id", "target_slot", "type")
    slots = [
        ("model", "MODEL", [1]),
        ("GEMMA", "GEMMA", [2]),
        ("latent_image", "LATENT", [6]),
        ("negative", "CONDITIONING", [7]),
    ]
    definition = {
        "id": inner,
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": 21, "lastLinkId": 60, "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": "Drawing",
        "inputNode": {"id": -10, "bounding": [300, 600, 120, 140]},
        "outputNode": {"id": -20, "bounding": [1700, 600, 120, 60]},
        "inputs": [
            {"id": f"00000000-0000-4000-8000-00000000000{k}", "name": name, "type": of, "linkIds": links}
            for k, (name, of, links) in enumerate(slots)
        ],
        "outputs": [{"id": "00000000-0000-4000-8000-000000000009", "name": "LATENT", "type": "LATENT", "linkIds": [5]}],
        "widgets": [],
        "nodes": inside,
        "groups": [],
        "links": [{"id": name, **dict(zip(fields, values, strict=True))} for name, values in ends.items()],
        "extra": {},
    }
    PLACES.setdefault(20, (830, 1020))
    PLACES.setdefault(21, (815, 690))
    drawing = node(
        20,
        inner,
        [],
        {
            "model": ("MODEL", 51),
            "GEMMA": ("GEMMA", 11),
            "latent_image": ("LATENT", 33),
            "negative": ("CONDITIONING", 36),
        },
        {"LATENT": ("LATENT", [34])},
    )
    reroute = node(21, "Reroute", [], {"": ("*", 50)}, {"": ("MODEL", [51])}, properties={"showOutputText": False})
    nodes[1]["outputs"][0]["links"] = [50]
    nodes[3]["outputs"][0]["links"], nodes[3]["outputs"][1]["links"] = [7], [8]
    outside = [found for name, found in nodes.items() if name not in (5, 7, 12)] + [drawing, reroute]
    links = [
        [2, 8, 0, 9, 1, "VAE"],
        [7, 3, 0, 4, 0, "INT"],
        [8, 3, 1, 4, 1, "INT"],
        [10, 2, 0, 6, 0, "GEMMA"],
        [11, 2, 0, 20, 1, "GEMMA"],
        [33, 4, 0, 20, 2, "LATENT"],
        [34, 20, 0, 9, 0, "LATENT"],
        [36, 6, 0, 20, 3, "CONDITIONING"],
        [38, 9, 0, 10, 0, "IMAGE"],
        [50, 1, 0, 21, 0, "MODEL"],
        [51, 21, 0, 20, 0, "MODEL"],
    ]
    bend = {"id": 1, "pos": [1500, 900], "linkIds": [2]}
    return workflow(
        outside,
        links,
        groups=[{"id": 1, "title": "Loaders", "bounding": [460, 620, 400, 600], "color": "#3f789e", "flags": {}}],
        definitions={"subgraphs": [definition]},
        extra={"reroutes": [bend], "linkExtensions": [{"id": 2, "parentId": 1}]},
    )


def of_lightning() -> dict:
    """ComfyUI-Lightning: its own ids but for the prompt's, which has no instruction there, and its files in folders that we have."""
    pack = {"aux_id": "shenduldh/ComfyUI-Lightning", "ver": "a4cd808280f5b27116fea62c821b1f977273bfbd"}
    whole = text_to_image()
    kept = {found["id"]: found for found in whole["nodes"] if found["id"] in (5, 7, 9, 10)}
    kept[5]["outputs"][0]["links"] = [37]
    kept[5]["properties"] = {"Node name for S&R": "SanaTextEncode", **pack}
    kept[7]["inputs"][0]["link"], kept[7]["inputs"][2]["link"] = 29, 39
    own = [
        node(
            1,
            "SanaDiffusionLoader",
            ["Sana_600M_512px.pth", "SanaMS_600M_P1_D28", "fp8_e4m3fn", True],
            {},
            {"MODEL": ("MODEL", [28])},
        ),
        node(2, "SanaCLIPLoader", ["gemma-2-2b-it", 300, "cuda", "auto"], {}, {"GEMMA": ("GEMMA", [10, 11])}),
        node(4, "SanaEmptyLatentImage", [1000, 512, 2], {}, {"LATENT": ("LATENT", [33])}),
        node(6, "SanaTextEncode", [""], {"GEMMA": ("GEMMA", 10)}, {"CONDITIONING": ("CONDITIONING", [39])}),
        node(8, "SanaVAELoader", ["dc-ae.safetensors", "fp16"], {}, {"VAE": ("VAE", [2])}),
        node(
            11,
            "ApplyMBCacheAndSkipBlocksForSana",
            ["14,17", 0.0002, "", 0, 1, -1],
            {"model": ("MODEL", 28)},
            {"MODEL": ("MODEL", [29])},
        ),
    ]
    for found in own:
        found["properties"] = {"Node name for S&R": found["type"], **pack}
    links = [
        [2, 8, 0, 9, 1, "VAE"],
        [10, 2, 0, 6, 0, "GEMMA"],
        [11, 2, 0, 5, 0, "GEMMA"],
        [28, 1, 0, 11, 0, "MODEL"],
        [29, 11, 0, 7, 0, "MODEL"],
        [33, 4, 0, 7, 3, "LATENT"],
        [34, 7, 0, 9, 0, "LATENT"],
        [37, 5, 0, 7, 1, "CONDITIONING"],
        [38, 9, 0, 10, 0, "IMAGE"],
        [39, 6, 0, 7, 2, "CONDITIONING"],
    ]
    return workflow([*own, *kept.values()], links)
