/**
 * What becomes of the nodes of other SANA packs: ComfyUI_ExtraModels (city96, lawrence-cj, Efficient-Large-Model) and
 * ComfyUI-Lightning. A table, which translation.js follows. Of each node it has
 *
 *   widgets: the names of its values, in the order in which workflows have them;
 *   isOld(values, node): for ids that others have as well, ours among them: whether it is a node of those packs;
 *   becomes(values, near): the nodes in its place, each with a `type`, its `values` in the order of its widgets, `inputs` (the new
 *       name of each old one that is kept), `outputs` (the new slot of each old one), and `feeds` (the input of the first of
 *       them that its output goes to). near.file(list, name) is the entry of a list of Load SANA that a name means, or a name;
 *       near.above(type) the values of the nearest node of a type above the input `model`; near.has(type) whether there is one;
 *   joins: the slot, and value, of the SANA loader in the same graph that take its place, where there is one;
 *   through: the input whose wire goes on in the place of its output: it has no counterpart here, and needs none;
 *   now: what a person is told about it.
 */

/** Of the properties cnr_id and aux_id, which tell what pack a node is of. A node of any other is none of these. */
export const PACKS = /extramodels|comfyui-lightning|^comfyui-sana$|^comfy-core$/i;

/** Of the nodes that are put in the place of others: the types of their outputs, and the height that they need, px. */
export const MADE = {
    SanaCheckpointLoader: { outputs: ["MODEL", "CLIP", "VAE"], height: 280 },
    SanaTextEncoderLoader: { outputs: ["CLIP"], height: 110 },
    DCAELoader: { outputs: ["VAE"], height: 110 },
    GemmaTextEncode: { outputs: ["CONDITIONING"], height: 270 },
    EmptySanaLatentImage: { outputs: ["LATENT"], height: 160 },
    SCMSampler: { outputs: ["LATENT"], height: 230 },
    SCMScheduler: { outputs: ["SIGMAS"], height: 150 },
    PrimitiveInt: { outputs: ["INT"], height: 90 },
};

const FREE = "width x height below"; // of the list of sizes
const VARIANTS = { SanaMS_1600M_P1_D20_2K: "sana-1.6b-2048px", SanaMS_1600M_P1_D20_4K: "sana-1.6b-4096px" };

const formats = (known) => (name) => known.find((format) => name?.toLowerCase().startsWith(format)) ?? "auto";
const modelFormat = formats(["fp32", "fp16", "bf16", "fp8"]);
const partFormat = formats(["fp32", "bf16"]); // Gemma and the DC-AE overflow in fp16

/** Whether a name is that of a repository of Hugging Face, from which the old nodes downloaded. Others are files of a list. */
const ofHub = (name) => /^[\w.-]+\/[\w.-]+$/.test(name) && !/\.(pth|pt|ckpt|bin|sft|safetensors)$/.test(name);

function loader(name, config, format, near) {
    const variant = ofHub(name) ? "auto" : VARIANTS[config] ?? "auto";
    return [{
        type: "SanaCheckpointLoader",
        values: [near.file("model", name), "auto", "auto", modelFormat(format), variant],
        outputs: [0],
    }];
}

const textEncoder = (name, format, near) =>
    [{ type: "SanaTextEncoderLoader", values: [near.file("text_encoder", name), partFormat(format)], outputs: [0] }];

const autoencoder = (name, format, near) =>
    [{ type: "DCAELoader", values: [near.file("vae", name), partFormat(format)], outputs: [0] }];

const prompt = (text, instruction) => [{
    type: "GemmaTextEncode",
    values: [text, instruction, "", "none"],
    inputs: { GEMMA: "clip", text: "text" },
    outputs: [0],
}];

/** The old nodes round down to whole cells of the latent when they run; ours refuse. */
const cells = (side) => Math.max(32, Math.floor(side / 32) * 32);

const latent = (v) => [{
    type: "EmptySanaLatentImage",
    values: [FREE, cells(v.width), cells(v.height), Math.min(v.batch_size, 64)],
    inputs: { width: "width", height: "height", batch_size: "batch_size" },
    outputs: [0],
}];

/** Older nodes of this kind have no scale of guidance, and *zsnr* in its place. */
const guidanceOf = (scm) => (typeof scm?.cfg_scale === "number" ? scm.cfg_scale : 4.5);

/** Two steps go over 1.3 radians and any other number of them is evenly spaced, in the old sampler as in ours. */
const sprint = (seed, control, steps, near) => [
    {
        type: "SCMSampler",
        values: [seed, control, guidanceOf(near.above("ScmModelSampling"))],
        inputs: { model: "model", positive: "positive", latent_image: "latent", seed: "seed", noise_seed: "seed" },
        outputs: [0],
    },
    { type: "SCMScheduler", values: [steps, 1.5708, 1.3, false], inputs: { steps: "steps" }, feeds: "sigmas" },
];

const number = (value, slot) =>
    ({ type: "PrimitiveInt", values: [value, "fixed"], outputs: { [slot]: 0 }, title: ["width", "height"][slot] });

const SIZE = ["width", "height", "batch_size"];
const EMPTY_LATENT = { widgets: SIZE, isOld: (v) => typeof v.width === "number", becomes: latent, now: "*Empty SANA latent*" };
const IN_LOADER = "of *Load SANA*, which loads text encoder and autoencoder, too";

export const NODES = {
    SanaCheckpointLoader: {
        widgets: ["ckpt_name", "model", "dtype", "enable_cfg_passthrough"],
        isOld: (v) => /^Sana(MS|Sprint)/.test(v.model),
        becomes: (v, near) => loader(v.ckpt_name, v.model, v.dtype, near),
        now: "*Load SANA*",
    },
    GemmaLoader: {
        widgets: ["model_name", "device", "dtype"],
        isOld: (v) => /gemma-2-2b-it/.test(v.model_name),
        becomes: (v, near) => textEncoder(v.model_name, v.dtype, near),
        joins: 1,
        now: `CLIP ${IN_LOADER}`,
    },
    ExtraVAELoader: {
        widgets: ["vae_name", "vae_type", "dtype"],
        isOld: (v) => /^dcae-f32c32/.test(v.vae_type) || /dc-ae-f32c32/.test(v.vae_name), // others are of other models
        becomes: (v, near) => autoencoder(v.vae_name, v.dtype, near),
        joins: 2,
        now: `VAE ${IN_LOADER}`,
    },
    SanaTextEncode: {
        widgets: ["text"],
        isOld: (v, node) => node.inputs?.some((input) => input.name === "GEMMA"),
        // That of ComfyUI-Lightning has no instruction.
        becomes: (v, near) => prompt(v.text, near.has("SanaCLIPLoader") ? "none" : "official"),
        now: "*SANA prompt*",
    },
    GemmaTextEncode: {
        widgets: ["text"],
        isOld: (v, node) => node.inputs?.some((input) => input.name === "GEMMA"),
        becomes: (v) => prompt(v.text, "none"),
        now: "*SANA prompt* without instruction",
    },
    EmptySanaLatentImage: EMPTY_LATENT,
    EmptyDCAELatentImage: EMPTY_LATENT,
    SanaResolutionSelect: {
        widgets: ["model", "ratio"],
        becomes: (v) => sizeOf(v.model, v.ratio).map(number),
        now: "two numbers; *Empty SANA latent* has a list of sizes of its own",
    },
    SanaResolutionCond: { widgets: ["width", "height"], through: "cond", now: "nothing: SANA reads the size from the latent" },
    ScmModelSampling: { widgets: ["cfg_scale", "zsnr"], through: "model", now: "*guidance* of *SANA Sprint sampler*" },
    KSampler: {
        widgets: ["seed", "control_after_generate", "steps", "cfg", "sampler_name", "scheduler", "denoise"],
        isOld: (v) => v.sampler_name === "scm",
        becomes: (v, near) => sprint(v.seed, v.control_after_generate, v.steps, near),
        now: "with scm: *SANA Sprint sampler* and *SANA Sprint schedule*; Sprint has no negative prompt",
    },
    KSamplerAdvanced: {
        widgets: ["add_noise", "noise_seed", "control_after_generate", "steps", "cfg", "sampler_name"],
        isOld: (v) => v.sampler_name === "scm",
        becomes: (v, near) => sprint(v.noise_seed, v.control_after_generate, v.steps, near),
        now: "with scm: *SANA Sprint sampler* and *SANA Sprint schedule*; Sprint has no negative prompt",
    },
    SanaDiffusionLoader: {
        widgets: ["model_name", "model_type", "weight_dtype", "convert_model_dtype"],
        becomes: (v, near) => loader(v.model_name, v.model_type, v.weight_dtype, near),
        now: "*Load SANA*",
    },
    SanaCLIPLoader: {
        widgets: ["model_name", "max_length", "device", "dtype"],
        becomes: (v, near) => textEncoder(v.model_name, v.dtype, near),
        joins: 1,
        now: `CLIP ${IN_LOADER}`,
    },
    SanaVAELoader: {
        widgets: ["model_name", "dtype"],
        becomes: (v, near) => autoencoder(v.model_name, v.dtype, near),
        joins: 2,
        now: `VAE ${IN_LOADER}`,
    },
    SanaEmptyLatentImage: EMPTY_LATENT,
    ApplyMBCacheAndSkipBlocksForSana: { widgets: [], through: "model", now: "nothing: no block is skipped" },
};

/** Where NVIDIA's models of an old name are: the file, its name and its address. Nothing for names of other files. */
export function release(name) {
    if (!ofHub(name)) return undefined;
    const file = `${name.split("/").pop()}.pth`;
    return { name: file, url: `https://huggingface.co/${name}/resolve/main/checkpoints/${file}`, directory: "diffusion_models" };
}

/** [width, height] in px of the pictures that SANA was trained on at 1024 px; those of its other sizes are in proportion. */
const SIDES = (
    "512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 " +
    "704x1408 704x1344 768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 " +
    "1024x1024 1024x960 1088x960 1088x896 1152x896 1152x832 1216x832 1280x768 1344x768 1408x704 " +
    "1472x704 1536x640 1600x640 1664x576 1728x576 1792x576 1856x512 1920x512 1984x512 2048x512"
).split(" ").map((size) => size.split("x").map(Number));
const BASES = { "512px": 512, "2K": 2048, "4K": 4096, SanaMS_1600M_P1_D20_2K: 2048, SanaMS_1600M_P1_D20_4K: 4096 };

/** [width, height] in px. ratio: width / height with two digits, as in the old list. */
function sizeOf(model, ratio) {
    const distance = ([width, height]) => Math.abs(width / height - (Number(ratio) || 1));
    const nearest = SIDES.reduce((best, size) => (distance(size) < distance(best) ? size : best));
    return nearest.map((side) => (side * (BASES[model] ?? 1024)) / 1024);
}
