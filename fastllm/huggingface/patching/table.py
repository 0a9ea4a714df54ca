"""Which classes of transformers our kernels compute: the table that ``fastllm.patch`` goes by.

A line is a family, the folder of ``transformers.models`` and its modeling file, and its classes with the parts of
each. The parts are ``norm`` (RMSNorm with its weight, or with none), ``norm+1`` (with 1 + its weight), ``mlp``
(down(silu(gate) · up)), ``rotary`` (rotary positions of halves), ``attention`` (through transformers' attention
registry, with masks that ours can stand for) and ``loss`` (the cross-entropy of lm_head's logits, softcapped or not).
Nothing is imported for it: classes that the installed transformers does not have are never met.

A class is listed when its own code agreed with the kernel: norms, MLPs, rotary functions and losses as
``patch(unknown="probe")`` tries them; attentions in small models of their family, with and without padding, against
transformers' own attention. What a class computes can depend on its configuration, and change with a version of
transformers; so ``patch`` confirms each module. The tests try the listed classes of the installed transformers again
(of attentions, only that they still ask the registry). The names are those of :data:`VERSION`; an older class of the
same name is left where it computes something else.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from .finding import defining_class

VERSION = "5.24"  # of transformers
LISTED = """
afmoe: AfmoeRMSNorm=norm AfmoeMLP=mlp AfmoeAttention=rotary,attention
aimv2: Aimv2RMSNorm=norm Aimv2MLP=mlp Aimv2Attention=attention
albert: AlbertAttention=attention
altclip: AltRobertaSelfAttention=attention AltCLIPAttention=attention
apertus: ApertusRMSNorm=norm ApertusAttention=rotary,attention ApertusForCausalLM=loss
apertus1p5: Apertus1p5TextRMSNorm=norm Apertus1p5TextAttention=rotary,attention Apertus1p5TextForCausalLM=loss
arcee: ArceeRMSNorm=norm ArceeAttention=rotary,attention ArceeForCausalLM=loss
aria: AriaTextRMSNorm=norm AriaSharedExpertsMLP=mlp AriaTextAttention=rotary,attention
axk1: AXK1RMSNorm=norm AXK1MLP=mlp AXK1Attention=rotary,attention
axk2: AXK2RMSNorm=norm AXK2Indexer=rotary AXK2MLP=mlp
bailing_hybrid: BailingHybridRMSNorm=norm BailingHybridMLP=mlp
bamba: BambaAttention=rotary BambaMLP=mlp BambaRMSNorm=norm BambaForCausalLM=loss
bart: BartAttention=attention
beam: BeamRMSNorm=norm BeamAttention=rotary,attention BeamMLP=mlp
beit: BeitAttention=attention
bert: BertSelfAttention=attention BertCrossAttention=attention
bert_generation: BertGenerationSelfAttention=attention BertGenerationDecoder=loss
biogpt: BioGptAttention=attention
bitnet: BitNetRMSNorm=norm BitNetAttention=rotary,attention BitNetForCausalLM=loss
blenderbot: BlenderbotAttention=attention
blenderbot_small: BlenderbotSmallAttention=attention
blip_2: Blip2Attention=attention
bloom: BloomForCausalLM=loss
blt: BltMLP=mlp BltRMSNorm=norm
bridgetower: BridgeTowerSelfAttention=attention
camembert: CamembertSelfAttention=attention CamembertForCausalLM=loss
canary: CanarySelfAttention=attention
chameleon: ChameleonRMSNorm=norm ChameleonMLP=mlp ChameleonAttention=rotary
chinese_clip: ChineseCLIPTextSelfAttention=attention ChineseCLIPVisionAttention=attention
clip: CLIPAttention=attention
clipseg: CLIPSegAttention=attention
clvp: ClvpRMSNorm=norm
codegen: CodeGenAttention=attention CodeGenForCausalLM=loss
cohere: CohereMLP=mlp CohereAttention=attention
cohere2: Cohere2Attention=attention Cohere2MLP=mlp
cohere2_moe: Cohere2MoeRMSNorm=norm Cohere2MoeMLP=mlp Cohere2MoeAttention=attention
cohere_compass: CohereCompassMLP=mlp CohereCompassAttention=rotary
cosmos3_edge: Cosmos3EdgeTextAttention=rotary,attention Cosmos3EdgeTextRMSNorm=norm
cpmant: CpmAntLayerNorm=norm
csm: CsmRMSNorm=norm CsmMLP=mlp CsmAttention=rotary,attention
ctrl: MultiHeadAttention=attention CTRLLMHeadModel=loss
cwm: CwmAttention=rotary,attention CwmRMSNorm=norm CwmMLP=mlp CwmForCausalLM=loss
data2vec/modeling_data2vec_audio: Data2VecAudioAttention=attention
data2vec/modeling_data2vec_text: Data2VecTextSelfAttention=attention Data2VecTextForCausalLM=loss
dbrx: DbrxAttention=rotary
decision_transformer: DecisionTransformerGPT2Attention=attention
deepseek_ocr2: DeepseekOcr2VisionMLP=mlp DeepseekOcr2VisionRMSNorm=norm DeepseekOcr2VisionAttention=rotary
    DeepseekOcr2TextAttention=rotary DeepseekOcr2TextMLP=mlp DeepseekOcr2TextRMSNorm=norm
deepseek_v2: DeepseekV2MLP=mlp DeepseekV2RMSNorm=norm DeepseekV2Attention=attention
deepseek_v3: DeepseekV3RMSNorm=norm DeepseekV3MLP=mlp DeepseekV3Attention=rotary,attention
deepseek_v32: DeepseekV32RMSNorm=norm DeepseekV32Indexer=rotary DeepseekV32MLP=mlp
deepseek_v4: DeepseekV4RMSNorm=norm DeepseekV4UnweightedRMSNorm=norm
deimv2: Deimv2RMSNorm=norm
deit: DeiTAttention=attention
dia: DiaMLP=mlp DiaRMSNorm=norm DiaSelfAttention=rotary,attention
diffllama: DiffLlamaMLP=mlp DiffLlamaAttention=rotary,attention DiffLlamaRMSNorm=norm DiffLlamaForCausalLM=loss
diffusion_gemma: DiffusionGemmaRMSNorm=norm DiffusionGemmaText4MLP=mlp
dinov2: Dinov2Attention=attention
dinov2_with_registers: Dinov2WithRegistersAttention=attention
dinov3_vit: DINOv3ViTAttention=attention DINOv3ViTGatedMLP=mlp
distilbert: DistilBertSelfAttention=attention
doge: DogeRMSNorm=norm DogeAttention=rotary DogeMLP=mlp
dory: DoryAttention=rotary DoryForCausalLM=loss
dots1: Dots1RMSNorm=norm Dots1Attention=rotary,attention Dots1MLP=mlp
dots3_note: Dots3NoteRMSNorm=norm Dots3NoteTextMLP=mlp Dots3NoteAudioAttention=rotary Dots3NoteAudioMLP=mlp
    Dots3NoteVisionMLP=mlp
dpt: DPTSelfAttention=attention
electra: ElectraSelfAttention=attention
embedding_gemma2: EmbeddingGemma2RMSNorm=norm EmbeddingGemma2Attention=rotary
emu3: Emu3Attention=rotary,attention Emu3RMSNorm=norm Emu3MLP=mlp Emu3ForCausalLM=loss
eomt_dinov3: EomtDinov3GatedMLP=mlp
ernie: ErnieSelfAttention=attention
ernie4_5: Ernie4_5MLP=mlp Ernie4_5Attention=attention Ernie4_5RMSNorm=norm Ernie4_5ForCausalLM=loss
ernie4_5_moe: Ernie4_5_MoeRMSNorm=norm Ernie4_5_MoeMLP=mlp Ernie4_5_MoeAttention=attention
ernie4_5_vl_moe: Ernie4_5_VLMoeRMSNorm=norm Ernie4_5_VLMoeMLP=mlp
esm: EsmSelfAttention=rotary
esmc: EsmcMLP=mlp EsmcAttention=rotary,attention
esmfold2: EsmFold2RMSNorm=norm EsmFold2SwiGLU=mlp EsmFold2AtomAttention=rotary
eurobert: EuroBertRMSNorm=norm EuroBertAttention=rotary,attention EuroBertMLP=mlp
evolla: EvollaSaProtSelfAttention=rotary,attention EvollaRMSNorm=norm EvollaMLP=mlp EvollaAttention=rotary
exaone4: Exaone4RMSNorm=norm Exaone4Attention=rotary,attention Exaone4MLP=mlp Exaone4ForCausalLM=loss
exaone4_5: Exaone4_5_RMSNorm=norm Exaone4_5_MLP=mlp Exaone4_5_Attention=rotary
exaone_moe: ExaoneMoeRMSNorm=norm ExaoneMoeAttention=rotary,attention ExaoneMoeMLP=mlp
falcon: FalconAttention=rotary FalconFlashAttention2=rotary FalconForCausalLM=loss
falcon_h1: FalconH1Attention=rotary,attention FalconH1MLP=mlp FalconH1RMSNorm=norm
falcon_mamba: FalconMambaWeightlessRMSNorm=norm FalconMambaRMSNorm=norm FalconMambaForCausalLM=loss
flex_olmo: FlexOlmoRMSNorm=norm FlexOlmoMLP=mlp FlexOlmoAttention=rotary,attention
flint: FlintRMSNorm=norm FlintMLP=mlp FlintAttention=rotary,attention
fuyu: FuyuForCausalLM=loss
gemma: GemmaRMSNorm=norm+1 GemmaAttention=rotary,attention GemmaForCausalLM=loss
gemma2: Gemma2RMSNorm=norm+1 Gemma2Attention=rotary,attention Gemma2ForCausalLM=loss
gemma3: Gemma3RMSNorm=norm+1 Gemma3Attention=rotary,attention Gemma3ForCausalLM=loss
gemma3n: Gemma3nRMSNorm=norm Gemma3nTextAttention=attention Gemma3nForCausalLM=loss
gemma4: Gemma4RMSNorm=norm Gemma4VisionMLP=mlp Gemma4TextAttention=attention
gemma4_unified: Gemma4UnifiedRMSNorm=norm Gemma4UnifiedTextAttention=attention
git: GitVisionAttention=attention
glm: GlmMLP=mlp GlmAttention=attention GlmRMSNorm=norm GlmForCausalLM=loss
glm4: Glm4MLP=mlp Glm4Attention=attention Glm4RMSNorm=norm Glm4ForCausalLM=loss
glm4_moe: Glm4MoeAttention=rotary,attention Glm4MoeMLP=mlp Glm4MoeRMSNorm=norm
glm4_moe_lite: Glm4MoeLiteAttention=rotary,attention Glm4MoeLiteMLP=mlp Glm4MoeLiteRMSNorm=norm
glm4v: Glm4vRMSNorm=norm Glm4VisionMlp=mlp Glm4vTextMLP=mlp
glm4v_moe: Glm4vMoeTextAttention=rotary,attention Glm4vMoeTextMLP=mlp Glm4vMoeTextRMSNorm=norm Glm4vMoeRMSNorm=norm
    Glm4vMoeisionMlp=mlp
glm5_next: Glm5NextTextRMSNorm=norm Glm5NextTextUnweightedRMSNorm=norm Glm5NextRMSNorm=norm
glm_image: GlmImageTextAttention=rotary GlmImageRMSNorm=norm GlmImageTextMLP=mlp
glm_moe_dsa: GlmMoeDsaRMSNorm=norm GlmMoeDsaMLP=mlp
glm_ocr: GlmOcrRMSNorm=norm GlmOcrVisionMlp=mlp GlmOcrTextMLP=mlp
glmasr: GlmAsrAttention=rotary,attention
gpt2: GPT2Attention=attention GPT2LMHeadModel=loss
gpt_bigcode: GPTBigCodeAttention=attention GPTBigCodeForCausalLM=loss
gpt_neo: GPTNeoForCausalLM=loss
gpt_neox: GPTNeoXAttention=rotary,attention GPTNeoXForCausalLM=loss
gpt_neox_japanese: GPTNeoXJapaneseAttention=rotary
gpt_oss: GptOssRMSNorm=norm GptOssAttention=attention
gptj: GPTJAttention=attention GPTJForCausalLM=loss
gradium_phonon_tts: GradiumPhononTTSTimestepNorm=norm GradiumPhononTTSAttention=rotary
granite: GraniteAttention=rotary,attention GraniteRMSNorm=norm GraniteMLP=mlp GraniteForCausalLM=loss
granite4_vision: Granite4VisionTextAttention=rotary,attention Granite4VisionTextRMSNorm=norm Granite4VisionTextMLP=mlp
granite_docling: GraniteDoclingTextAttention=rotary,attention GraniteDoclingTextRMSNorm=norm GraniteDoclingTextMLP=mlp
granite_swa: GraniteSWAAttention=rotary,attention GraniteSWARMSNorm=norm GraniteSWAMLP=mlp GraniteSWAForCausalLM=loss
granitemoe: GraniteMoeRMSNorm=norm GraniteMoeAttention=rotary,attention
granitemoe_swa: GraniteMoeSWAAttention=rotary,attention GraniteMoeSWARMSNorm=norm
granitemoehybrid: GraniteMoeHybridAttention=rotary GraniteMoeHybridRMSNorm=norm
granitemoeshared: GraniteMoeSharedRMSNorm=norm GraniteMoeSharedAttention=rotary,attention
gte: GteAttention=rotary,attention GteMLP=mlp
helium: HeliumRMSNorm=norm HeliumMLP=mlp HeliumAttention=attention HeliumForCausalLM=loss
higgs_audio_v2: HiggsAudioV2MLP=mlp HiggsAudioV2RMSNorm=norm HiggsAudioV2Attention=rotary,attention
hrm_text: HrmTextRMSNorm=norm HrmTextMLP=mlp HrmTextAttention=rotary,attention HrmTextForCausalLM=loss
hubert: HubertAttention=attention
hunyuan_v1_dense: HunYuanDenseV1RMSNorm=norm HunYuanDenseV1MLP=mlp HunYuanDenseV1Attention=rotary,attention
    HunYuanDenseV1ForCausalLM=loss
hunyuan_v1_moe: HunYuanMoEV1RMSNorm=norm HunYuanMoEV1MLP=mlp HunYuanMoEV1Attention=rotary,attention
hunyuan_vl: HunYuanVLRMSNorm=norm HunYuanVLDenseV1Attention=rotary HunYuanVLMLP=mlp
hy_v3: HYV3RMSNorm=norm HYV3MLP=mlp HYV3Attention=rotary,attention
hy_v4: HYV4RMSNorm=norm HYV4Indexer=rotary HYV4Attention=rotary HYV4MLP=mlp
hy_v4_vl: HYV4VLAttention=attention HYV4VLMLP=mlp HYV4VLRMSNorm=norm
hyperclovax: HyperCLOVAXRMSNorm=norm HyperCLOVAXAttention=rotary,attention HyperCLOVAXMLP=mlp
    HyperCLOVAXForCausalLM=loss
idefics: IdeficsRMSNorm=norm IdeficsMLP=mlp IdeficsAttention=rotary
idefics2: Idefics2RMSNorm=norm
idefics3: Idefics3RMSNorm=norm
ijepa: IJepaAttention=attention
imagegpt: ImageGPTLayerNorm=norm
inkling: InklingRMSNorm=norm
inkling2: Inkling2RMSNorm=norm Inkling2UnweightedRMSNorm=norm
inkling2_loop: Inkling2LoopUnweightedRMSNorm=norm Inkling2LoopRMSNorm=norm
instructblip: InstructBlipAttention=attention InstructBlipQFormerMultiHeadAttention=attention
instructblipvideo: InstructBlipVideoAttention=attention InstructBlipVideoQFormerMultiHeadAttention=attention
internvl: InternVLVisionRMSNorm=norm InternVLVisionAttention=attention
jais2: Jais2Attention=rotary,attention Jais2ForCausalLM=loss
jamba: JambaRMSNorm=norm JambaMLP=mlp
janus: JanusVisionAttention=attention
jetmoe: JetMoeRMSNorm=norm JetMoeAttention=rotary
jina_embeddings_v3: JinaEmbeddingsV3Attention=rotary,attention
kimi_linear: KimiLinearRMSNorm=norm KimiLinearMLP=mlp
kolibri1: Kolibri1RMSNorm=norm Kolibri1Attention=rotary,attention Kolibri1MLP=mlp
kosmos2: Kosmos2VisionAttention=attention KosmosTextAttention=attention
kosmos2_5: Kosmos2_5LayerNorm=norm Kosmos2_5TextAttention=attention
kyutai_speech_to_text: KyutaiSpeechToTextRMSNorm=norm KyutaiSpeechToTextAttention=rotary
    KyutaiSpeechToTextForConditionalGeneration=loss
laguna: LagunaRMSNorm=norm LagunaMLP=mlp LagunaAttention=rotary,attention
lara_mini: LaraMiniRMSNorm=norm LaraMiniAttention=rotary,attention LaraMiniMLP=mlp
lasr: LasrEncoderAttention=rotary,attention
layoutlm: LayoutLMSelfAttention=attention
lfm2: Lfm2RMSNorm=norm Lfm2Attention=rotary,attention Lfm2ForCausalLM=loss
lfm2_moe: Lfm2MoeRMSNorm=norm Lfm2MoeAttention=rotary
lfm3: Lfm3RMSNorm=norm Lfm3Attention=rotary Lfm3ForCausalLM=loss
lfm3_vl: Lfm3VlVisionRMSNorm=norm
lighton_ocr: LightOnOcrRMSNorm=norm
llama: LlamaRMSNorm=norm LlamaMLP=mlp LlamaAttention=rotary,attention LlamaForCausalLM=loss
llama4: Llama4TextMLP=mlp Llama4TextL2Norm=norm Llama4TextRMSNorm=norm
longcat_flash: LongcatFlashRMSNorm=norm LongcatFlashMLP=mlp LongcatFlashMLA=attention
longt5: LongT5LayerNorm=norm
m2m_100: M2M100Attention=attention
mamba: MambaRMSNorm=norm MambaForCausalLM=loss
mamba2: Mamba2RMSNorm=norm Mamba2ForCausalLM=loss
marian: MarianAttention=attention
markuplm: MarkupLMSelfAttention=attention
maskformer: MaskFormerDetrSelfAttention=attention MaskFormerDetrCrossAttention=attention
mbart: MBartAttention=attention
mellum: MellumRMSNorm=norm MellumAttention=rotary,attention MellumMLP=mlp
metaclip_2: MetaClip2Attention=attention
mimi: MimiAttention=rotary
mimo_v2_flash: MiMoV2FlashRMSNorm=norm MiMoV2FlashMLP=mlp MiMoV2FlashAttention=rotary,attention
minicpm3: MiniCPM3RMSNorm=norm MiniCPM3MLP=mlp MiniCPM3Attention=rotary,attention MiniCPM3ForCausalLM=loss
minimax: MiniMaxRMSNorm=norm MiniMaxAttention=rotary
minimax_m2: MiniMaxM2RMSNorm=norm MiniMaxM2Attention=rotary,attention
minimax_m3_vl: MiniMaxM3VLRMSNorm=norm+1 MiniMaxM3VLAttention=rotary,attention MiniMaxM3VLIndexer=rotary
ministral: MinistralMLP=mlp MinistralAttention=rotary,attention MinistralRMSNorm=norm MinistralForCausalLM=loss
ministral3: Ministral3Attention=rotary,attention Ministral3MLP=mlp Ministral3RMSNorm=norm Ministral3ForCausalLM=loss
mistral: MistralMLP=mlp MistralAttention=rotary,attention MistralRMSNorm=norm MistralForCausalLM=loss
mistral3: Mistral3RMSNorm=norm
mistral4: Mistral4RMSNorm=norm Mistral4MLP=mlp Mistral4Attention=rotary,attention
mistral_large4: MistralLarge4RMSNorm=norm MistralLarge4TextMLP=mlp
mixtral: MixtralRMSNorm=norm MixtralAttention=rotary,attention
mlcd: MLCDAttention=attention
mllama: MllamaTextRMSNorm=norm MllamaTextSelfAttention=rotary,attention MllamaTextMLP=mlp
mobilebert: MobileBertSelfAttention=attention
modernbert: ModernBertAttention=rotary,attention
modernbert_decoder: ModernBertDecoderAttention=rotary,attention
molmo2: Molmo2RMSNorm=norm Molmo2Attention=rotary,attention Molmo2MLP=mlp Molmo2ImageProjectorMLP=mlp
moonshine: MoonshineAttention=attention
moonshine_streaming: MoonshineStreamingEncoderAttention=attention MoonshinMoonshineStreamingDecoderMLP=mlp
moshi: MoshiRMSNorm=norm MoshiAttention=rotary MoshiForCausalLM=loss
moss_transcribe_diarize: MossTranscribeDiarizeAudioAttention=attention
mpt: MptForCausalLM=loss
mt5: MT5LayerNorm=norm
muse_glimmer: MuseGlimmerRMSNorm=norm MuseGlimmerTextCenteredRMSNorm=norm+1 MuseGlimmerTextMLP=mlp
    MuseGlimmerTextAttention=rotary,attention
muse_glimmer_assistant: MuseGlimmerAssistantRMSNorm=norm MuseGlimmerAssistantAttention=rotary
    MuseGlimmerAssistantMLP=mlp
muse_spark: MuseSparkRMSNorm=norm MuseSparkTextCenteredRMSNorm=norm+1 MuseSparkTextMLP=mlp
    MuseSparkTextAttention=rotary,attention
nanochat: NanoChatRMSNorm=norm NanoChatAttention=attention NanoChatForCausalLM=loss
nemotron: NemotronAttention=rotary,attention NemotronForCausalLM=loss
nemotron3_5_transcribe: Nemotron3_5TranscribeAttention=rotary
nemotron3_diarization: Nemotron3DiarizationAttention=rotary
nemotron_h: NemotronHRMSNorm=norm NemotronHAttention=attention
nemotron_h_omni: NemotronH_Omni_RMSNorm=norm
neomme: NeoMMERMSNorm=norm NeoMMEAttention=rotary
neucodec: NeuCodecAttention=rotary NeuCodecRMSNorm=norm
nomic_bert: NomicBertAttention=rotary,attention NomicBertMLP=mlp
olmo: OlmoMLP=mlp OlmoAttention=rotary,attention OlmoForCausalLM=loss
olmo2: Olmo2RMSNorm=norm Olmo2Attention=rotary,attention Olmo2MLP=mlp Olmo2ForCausalLM=loss
olmo3: Olmo3RMSNorm=norm Olmo3Attention=rotary,attention Olmo3MLP=mlp Olmo3ForCausalLM=loss
olmo_hybrid: OlmoHybridRMSNorm=norm OlmoHybridAttention=rotary,attention OlmoHybridMLP=mlp OlmoHybridForCausalLM=loss
olmoe: OlmoeRMSNorm=norm OlmoeMLP=mlp OlmoeAttention=rotary,attention
openai: OpenAIGPTLMHeadModel=loss
openai_privacy_filter: OpenAIPrivacyFilterRMSNorm=norm OpenAIPrivacyFilterAttention=attention
opt: OPTAttention=attention
ovis2: Ovis2RMSNorm=norm Ovis2VisionMLP=mlp Ovis2MLP=mlp
owlv2: Owlv2Attention=attention
owlvit: OwlViTAttention=attention
paddleocr_vl: PaddleOCRMLP=mlp PaddleOCRAttention=rotary,attention PaddleOCRRMSNorm=norm
parakeet: ParakeetEncoderAttention=attention
pe_audio: PeAudioEncoderRMSNorm=norm PeAudioEncoderMLP=mlp
pe_audio_video: PeAudioVideoEncoderMLP=mlp PeAudioVideoEncoderRMSNorm=norm
pe_video: PeVideoEncoderRMSNorm=norm PeVideoEncoderMLP=mlp
pegasus: PegasusAttention=attention
persimmon: PersimmonAttention=rotary,attention PersimmonForCausalLM=loss
phi: PhiAttention=rotary,attention PhiForCausalLM=loss
phi3: Phi3MLP=mlp Phi3Attention=rotary,attention Phi3RMSNorm=norm Phi3ForCausalLM=loss
phi4_multimodal: Phi4MultimodalRMSNorm=norm Phi4MultimodalMLP=mlp Phi4MultimodalAttention=rotary,attention
    Phi4MultimodalForCausalLM=loss
phimoe: PhimoeAttention=rotary,attention
pix2struct: Pix2StructLayerNorm=norm
pixio: PixioAttention=attention
pixtral: PixtralAttention=rotary,attention PixtralMLP=mlp PixtralRMSNorm=norm
plbart: PLBartAttention=attention
pocket_tts: PocketTTSAttention=rotary
pocket_tts_audio_tokenizer: PocketTTSAudioTokenizerAttention=rotary
pop2piano: Pop2PianoLayerNorm=norm
qianfan_ocr: QianfanOCRVisionRMSNorm=norm QianfanOCRVisionAttention=attention
qwen2: Qwen2MLP=mlp Qwen2Attention=rotary,attention Qwen2RMSNorm=norm Qwen2ForCausalLM=loss
qwen2_5_omni: Qwen2_5OmniRMSNorm=norm Qwen2_5OmniMLP=mlp Qwen2_5OmniAttention=rotary Qwen2MLP=mlp DiTAttention=rotary
qwen2_5_vl: Qwen2_5_VLRMSNorm=norm Qwen2_5_VLMLP=mlp Qwen2MLP=mlp Qwen2_5_VLAttention=rotary,attention
qwen2_audio: Qwen2AudioAttention=attention
qwen2_moe: Qwen2MoeRMSNorm=norm Qwen2MoeMLP=mlp Qwen2MoeAttention=rotary,attention
qwen2_vl: Qwen2VLRMSNorm=norm Qwen2MLP=mlp Qwen2VLAttention=rotary,attention
qwen3: Qwen3RMSNorm=norm Qwen3MLP=mlp Qwen3Attention=rotary,attention Qwen3ForCausalLM=loss
qwen3_5: Qwen3_5Attention=rotary Qwen3_5MLP=mlp Qwen3_5RMSNorm=norm+1 Qwen3_5ForCausalLM=loss
qwen3_5_moe: Qwen3_5MoeAttention=rotary Qwen3_5MoeMLP=mlp Qwen3_5MoeRMSNorm=norm+1
qwen3_moe: Qwen3MoeAttention=rotary,attention Qwen3MoeMLP=mlp Qwen3MoeRMSNorm=norm
qwen3_next: Qwen3NextRMSNorm=norm+1 Qwen3NextAttention=rotary Qwen3NextMLP=mlp
qwen3_omni_moe: Qwen3OmniMoeThinkerTextRMSNorm=norm Qwen3OmniMoeThinkerTextAttention=rotary,attention
    Qwen3OmniMoeThinkerTextMLP=mlp Qwen3OmniMoeTextRMSNorm=norm Qwen3OmniMoeRMSNorm=norm
    Qwen3OmniMoeTalkerCodePredictorAttention=rotary Qwen3OmniMoeMLP=mlp Qwen3OmniMoeTalkerTextMLP=mlp
    Qwen3OmniMoeCode2WavAttention=rotary Qwen3OmniMoeCode2WavMlp=mlp Qwen3OmniMoeCode2WavRMSNorm=norm
qwen3_vl: Qwen3VLTextRMSNorm=norm Qwen3VLTextAttention=rotary,attention Qwen3VLTextMLP=mlp
qwen3_vl_moe: Qwen3VLMoeTextRMSNorm=norm Qwen3VLMoeTextAttention=rotary,attention Qwen3VLMoeTextMLP=mlp
qwen4_exp: Qwen4ExpTextRMSNorm=norm+1 Qwen4ExpTextQSAIndexer=rotary Qwen4ExpTextAttention=rotary Qwen4ExpTextMLP=mlp
radio: RadioAttention=attention
recurrent_gemma: RecurrentGemmaRMSNorm=norm+1 RecurrentGemmaAttention=rotary
roberta: RobertaSelfAttention=attention RobertaForCausalLM=loss
roberta_prelayernorm: RobertaPreLayerNormSelfAttention=attention RobertaPreLayerNormForCausalLM=loss
roc_bert: RoCBertSelfAttention=attention
sam3: Sam3ViTRoPEAttention=attention
sapiens2: Sapiens2RMSNorm=norm Sapiens2Attention=attention Sapiens2GatedMLP=mlp
seamless_m4t: SeamlessM4TAttention=attention
seamless_m4t_v2: SeamlessM4Tv2Attention=attention
seed_oss: SeedOssRMSNorm=norm SeedOssMLP=mlp SeedOssAttention=rotary,attention SeedOssForCausalLM=loss
segformer: SegformerAttention=attention
sew: SEWAttention=attention
siglip: SiglipAttention=attention
siglip2: Siglip2Attention=attention
smollm3: SmolLM3Attention=rotary,attention SmolLM3RMSNorm=norm SmolLM3MLP=mlp SmolLM3ForCausalLM=loss
solar_open: SolarOpenMLP=mlp SolarOpenAttention=rotary,attention SolarOpenRMSNorm=norm
speech_to_text: Speech2TextAttention=attention
stablelm: StableLmMLP=mlp StableLmAttention=rotary,attention StableLmForCausalLM=loss
starcoder2: Starcoder2Attention=rotary,attention Starcoder2ForCausalLM=loss
step3p7: Step3p7RMSNorm=norm+1 Step3p7Attention=rotary
swin: SwinAttention=attention
switch_transformers: SwitchTransformersLayerNorm=norm
t5: T5LayerNorm=norm
t5gemma: T5GemmaRMSNorm=norm+1 T5GemmaSelfAttention=rotary,attention T5GemmaCrossAttention=attention
t5gemma2: T5Gemma2RMSNorm=norm+1 T5Gemma2SelfAttention=rotary T5Gemma2MergedAttention=rotary
timesfm: TimesFmRMSNorm=norm
timesfm2_5: TimesFm2_5RMSNorm=norm TimesFm2_5Attention=rotary
tipsv2: Tipsv2VisionAttention=attention Tipsv2TextAttention=attention
udop: UdopLayerNorm=norm
ultrabert: UltrabertRMSNorm=norm UltrabertAttention=rotary,attention UltrabertMLP=mlp
ultravbert: UltraVBertRMSNorm=norm
umt5: UMT5LayerNorm=norm
unispeech: UniSpeechAttention=attention
unispeech_sat: UniSpeechSatAttention=attention
unlimited_ocr: UnlimitedOcrTextAttention=rotary UnlimitedOcrTextMLP=mlp UnlimitedOcrTextRMSNorm=norm
vaultgemma: VaultGemmaRMSNorm=norm+1 VaultGemmaAttention=rotary,attention VaultGemmaForCausalLM=loss
vibevoice: VibeVoiceRMSNorm=norm VibeVoiceMLP=mlp VibeVoiceForConditionalGeneration=loss
vibevoice_acoustic_tokenizer: VibeVoiceAcousticTokenizerRMSNorm=norm
vibevoice_asr: VibeVoiceAsrRMSNorm=norm
vit: ViTAttention=attention
vit_msn: ViTMSNAttention=attention
voxtral: VoxtralAttention=attention
voxtral_realtime: VoxtralRealtimeRMSNorm=norm VoxtralRealtimeAttention=rotary,attention VoxtralRealtimeMLP=mlp
    VoxtralRealtimeTextAttention=rotary VoxtralRealtimeTextMLP=mlp
wav2vec2: Wav2Vec2Attention=attention
whisper: WhisperAttention=attention
x_clip: XCLIPAttention=attention
xcodec2: Xcodec2Attention=rotary Xcodec2RMSNorm=norm
xglm: XGLMForCausalLM=loss
xlm_roberta: XLMRobertaSelfAttention=attention XLMRobertaForCausalLM=loss
xlm_roberta_xl: XLMRobertaXLSelfAttention=attention XLMRobertaXLForCausalLM=loss
xlstm: xLSTMRMSNorm=norm
xmod: XmodSelfAttention=attention XmodForCausalLM=loss
yolos: YolosSelfAttention=attention
youtu: YoutuRMSNorm=norm YoutuMLP=mlp YoutuAttention=rotary,attention YoutuForCausalLM=loss
zamba: ZambaRMSNorm=norm ZambaMLP=mlp
zamba2: Zamba2RMSNorm=norm Zamba2Attention=rotary
zaya: ZayaRMSNorm=norm ZayaAttention=rotary,attention
"""

# Near misses: what looks like a kernel's work and is not.
LEFT = {
    ("mlp", "its gate and up are clamped"): """
        deepseek_v4.DeepseekV4MLP glm5_next.Glm5NextTextMLP glm5_next.Glm5NextVisionMLP
        minimax_m3_vl.MiniMaxM3VLDenseMLP step3p7.Step3p7MLP
    """,
    ("mlp", "its gate is a GELU"): """
        embedding_gemma2.EmbeddingGemma2MLP gemma.GemmaMLP gemma2.Gemma2MLP gemma3.Gemma3MLP gemma3n.Gemma3nTextMLP
        gemma4.Gemma4TextMLP gemma4_unified.Gemma4UnifiedTextMLP recurrent_gemma.RecurrentGemmaMlp t5gemma.T5GemmaMLP
        t5gemma2.T5Gemma2MLP vaultgemma.VaultGemmaMLP
    """,
    ("mlp", "it has a norm or more weights than the projections"): """
        bitnet.BitNetMLP dory.DoryMLP inkling.InklingMLP
    """,
    ("rotary", "its rotary function turns other pairs, neighbours for example, or has another form"): """
        blt.BltSelfAttention clvp.ClvpSelfAttention codegen.CodeGenAttention cohere.CohereAttention
        cohere2.Cohere2Attention cohere2_moe.Cohere2MoeAttention deepseek_v4.DeepseekV4Attention
        deepseek_v4.DeepseekV4CSACompressor deepseek_v4.DeepseekV4HCACompressor deepseek_v4.DeepseekV4Indexer
        diffusion_gemma.DiffusionGemmaDecoderTextAttention diffusion_gemma.DiffusionGemmaEncoderTextAttention
        dinov3_vit.DINOv3ViTAttention efficientloftr.EfficientLoFTRAttention eomt_dinov3.EomtDinov3Attention
        ernie4_5.Ernie4_5Attention ernie4_5_moe.Ernie4_5_MoeAttention ernie4_5_vl_moe.Ernie4_5_VLMoeTextAttention
        gemma3n.Gemma3nTextAttention gemma4.Gemma4TextAttention gemma4_unified.Gemma4UnifiedTextAttention
        glm.GlmAttention glm4.Glm4Attention glm4v.Glm4vTextAttention glm_ocr.GlmOcrTextAttention
        gpt_oss.GptOssAttention gptj.GPTJAttention helium.HeliumAttention hy_v4_vl.HYV4VLAttention
        hy_v4_vl.HYV4VLIndexer lightglue.LightGlueAttention moonshine.MoonshineAttention
        moonshine_streaming.MoonshineStreamingAttention nanochat.NanoChatAttention
        openai_privacy_filter.OpenAIPrivacyFilterAttention pe_audio.PeAudioEncoderAttention
        pe_audio_video.PeAudioVideoEncoderAttention pe_video.PeVideoEncoderAttention sapiens2.Sapiens2Attention
    """,
    ("norm", "it subtracts the mean"): """
        cohere.CohereLayerNorm cohere2.Cohere2LayerNorm cohere2_moe.Cohere2MoeLayerNorm
        cohere_compass.CohereCompassLayerNorm convnext.ConvNextLayerNorm convnextv2.ConvNextV2LayerNorm
        deberta.DebertaLayerNorm deepseek_ocr2.DeepseekOcr2SamLayerNorm deepseek_vl_hybrid.DeepseekVLHybridLayerNorm
        dinov3_convnext.DINOv3ConvNextLayerNorm edgetam.EdgeTamLayerNorm edgetam_video.EdgeTamVideoLayerNorm
        eomt.EomtLayerNorm2d eomt_dinov3.EomtDinov3LayerNorm2d esm/modeling_esmfold.EsmFoldLayerNorm esmc.EsmcLayerNorm
        esmfold2.EsmFold2LayerNorm got_ocr2.GotOcr2LayerNorm gradium_phonon_tts.GradiumPhononTTSFlowLayerNorm
        lw_detr.LwDetrLayerNorm nemotron.NemotronLayerNorm1P olmo.OlmoLayerNorm pocket_tts.PocketTTSFlowLayerNorm
        pp_formulanet.PPFormulaNetLayerNorm rf_detr.RfDetrLayerNorm sam.SamLayerNorm sam2.Sam2LayerNorm
        sam2_video.Sam2VideoLayerNorm sam3_tracker.Sam3TrackerLayerNorm sam3_tracker_video.Sam3TrackerVideoLayerNorm
        sam_hq.SamHQLayerNorm seggpt.SegGptLayerNorm slanext.SLANeXtLayerNorm squeezebert.SqueezeBertLayerNorm
        unlimited_ocr.UnlimitedOcrSamLayerNorm videomt.VideomtLayerNorm2d videoprism.VideoPrismLayerNorm
        vitdet.VitDetLayerNorm xlstm.xLSTMMultiHeadLayerNorm
    """,
    ("norm", "it multiplies by a gate"): """
        bailing_hybrid.BailingHybridRMSNormGated bamba.BambaRMSNormGated falcon_h1.FalconH1RMSNormGated
        glm5_next.Glm5NextTextRMSNormGated granitemoehybrid.GraniteMoeHybridRMSNormGated
        kimi_linear.KimiLinearRMSNormGated lara_mini.LaraMiniRMSNormGated mamba2.MambaRMSNormGated
        nemotron_h.NemotronHRMSNormGated olmo_hybrid.OlmoHybridRMSNormGated qwen3_5.Qwen3_5RMSNormGated
        qwen3_5_moe.Qwen3_5MoeRMSNormGated qwen3_next.Qwen3NextRMSNormGated qwen4_exp.Qwen4ExpTextRMSNormGated
        zamba2.Zamba2RMSNormGated
    """,
    ("attention", "it uses the mask for more than which keys a query sees"): """
        axk2.AXK2Attention bigbird_pegasus.BigBirdPegasusDecoderAttention deepseek_v32.DeepseekV32Attention
        deepseek_v4.DeepseekV4Attention doge.DogeAttention dory.DoryAttention glm_moe_dsa.GlmMoeDsaAttention
        hy_v4.HYV4Attention
    """,
    ("loss", "its logits are scaled, or its loss has more terms"): """
        cohere.CohereForCausalLM cohere2.Cohere2ForCausalLM falcon_h1.FalconH1ForCausalLM
    """,
}

_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "norm": ("norm", {"weight_offsets": (0.0,)}),
    "norm+1": ("norm", {"weight_offsets": (1.0,)}),
}


def options_of(module: nn.Module) -> dict[str, dict[str, Any]]:
    """The parts that the table lists for the class of ``module``, and the options of each."""
    kind = defining_class(module)
    return listed().get((kind.__module__, kind.__qualname__), {})


def why_left(part: str, module: nn.Module) -> str | None:
    """The reason, if the class of ``module`` is a known near miss of this part."""
    kind = defining_class(module)
    return near_misses().get((part, kind.__module__, kind.__qualname__))


@functools.cache
def listed() -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """(module, class) -> part -> options."""
    table: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for word in LISTED.split():
        if word.endswith(":"):
            file = modeling_file(word[:-1])
        else:
            kind, _, parts = word.partition("=")
            table[file, kind] = dict(_OPTIONS.get(part, (part, {})) for part in parts.split(","))
    return table


@functools.cache
def near_misses() -> dict[tuple[str, str, str], str]:
    """(part, module, class) -> why it is left."""
    named = ((part, why, name.split(".")) for (part, why), names in LEFT.items() for name in names.split())
    return {(part, modeling_file(family), kind): why for part, why, (family, kind) in named}


def modeling_file(family: str) -> str:
    """``llama``, or where a folder has several files ``data2vec/modeling_data2vec_text``, as a module's name."""
    folder, _, file = family.partition("/")
    return f"transformers.models.{folder}.{file or f'modeling_{folder}'}"


def families() -> str:
    """The table of families and parts, as Markdown."""
    parts: dict[str, set[str]] = {}
    for (file, _), found in listed().items():
        parts.setdefault(file.split(".")[2], set()).update(found)
    columns = ("norm", "mlp", "rotary", "attention", "loss")
    lines = [f"| family | {' | '.join(columns)} |", "| --- |" + " :-: |" * len(columns)]
    for family, has in sorted(parts.items()):
        lines.append(f"| {family} | {' | '.join('x' if part in has else '' for part in columns)} |")
    return "\n".join(lines)
