"""Everything that a report says, in English and in Chinese."""

import re
from dataclasses import dataclass
from typing import Literal

Language = Literal["en", "zh"]


@dataclass(frozen=True)
class Words:
    """Phrases and sentences of one language; braces hold numbers."""

    title: str
    made_by: str
    source: str
    command: str
    # what columns and axes are called
    layer: str
    expert: str
    domain: str
    model: str
    case: str
    tokens: str
    documents: str
    share: str
    bits: str
    nats: str
    # of what was read
    held_out: str
    maybe_seen: str
    # who serves whom
    specialization: str
    specialization_text: str
    load: str
    relative_load: str
    information: str
    information_axis: str
    token_share: str
    token_share_axis: str
    devoted: str
    typical: str
    # without each expert
    ablation: str
    ablation_text: str
    forced_text: str
    cost: str
    cost_axis: str
    missed: str
    interval: str
    cause: str
    cause_axis: str
    cause_text: str
    # side by side
    comparison: str
    comparison_text: str
    quality: str
    quality_axis: str
    difference: str
    difference_axis: str
    speed: str
    first_token: str
    further_token: str
    milliseconds: str
    costs: dict[str, str]
    joules: str
    not_available: str
    over_seeds: str
    # studies
    study: str
    study_text: str
    study_measures: dict[str, str]
    against: str
    note: str
    # what a model asks of a machine
    plan: str
    plan_text: str
    plan_parts: dict[str, str]
    count: str
    of_all: str
    plan_costs: dict[str, str]
    speed_text: str
    speed_head: dict[str, str]
    roofline: str
    roof: str
    slope: str
    reading: str
    writing: str
    intensity: str
    flop_rate: str
    comma: str
    own: dict[str, str]
    """Moescope's own domains, studies, cases and notes; others keep the names they were given."""

    def name(self, given: str) -> str:
        """What something is called that a file names; numbers in it stay."""
        numbers = re.findall(r"\d+(?:\.\d+)?", given)
        form = re.sub(r"\d+(?:\.\d+)?", "{}", given)
        return self.own[form].format(*numbers) if form in self.own else given


WORDS: dict[Language, Words] = {
    "en": Words(
        title="What the experts do",
        made_by="Made by moescope {version}. Numbers stand in the JSON files beside this page.",
        source="Source",
        command="Command",
        layer="layer {layer}",
        expert="expert",
        domain="domain",
        model="model",
        case="case",
        tokens="tokens",
        documents="documents",
        share="share",
        bits="bits",
        nats="nats per token",
        held_out="None of the text was trained on.",
        maybe_seen="Nothing tells whether the text of {domains} was trained on, so it may be no "
        "held-out text.",
        specialization="Which experts serve which domain: {model}",
        specialization_text="{tokens:,} tokens in {documents:,} documents of {domains} domains. "
        "Knowing one of a token's experts tells most about its domain in layer {best}: "
        "{bits:.3f} of at most {most:.2f} bits. The token alone, without its context, decides "
        "{first:.0%} of the choice in layer {first_layer} and {last:.0%} in layer {last_layer}.",
        load="How much of each domain each expert serves (experts sorted by their domain)",
        relative_load="load over an even share",
        information="What an expert tells about the domain (bars: one standard error)",
        information_axis="bits",
        token_share="How far the token alone decides",
        token_share_axis="share of the choice",
        devoted="The most devoted experts of each domain, were all domains as frequent",
        typical="tokens that it receives more often than others",
        ablation="What each domain loses without each expert: {model}",
        ablation_text="Experts were switched off one at a time, their tokens went to the next "
        "best; {tokens:,} tokens in {documents:,} documents. Of {all} changes, {worse} are rises "
        "of the loss and {better} are falls whose 95 % interval leaves out zero; by chance alone "
        "it would be {chance:.0f} in all.",
        forced_text="Every token was sent to one expert at a time; {tokens:,} tokens in "
        "{documents:,} documents. Of {all} changes, {worse} are rises of the loss and {better} "
        "are falls whose 95 % interval leaves out zero; by chance alone it would be {chance:.0f} "
        "in all.",
        cost="By how much the loss of each domain rises (experts sorted by the domain hit most)",
        cost_axis="nats per token",
        missed="The experts that cost each domain most",
        interval="95 % interval",
        cause="Does the load tell what an expert is worth?",
        cause_axis="share of the domain's load",
        cause_text="Spearman's rank correlation between an expert's share of a domain's tokens "
        "and what switching it off costs that domain: {list}.",
        comparison="Side by side: {models}",
        comparison_text="The same {documents:,} documents ({text_bytes:,} bytes) for all; "
        "{rounds} rounds of timing in turns, on {threads} threads of {machine}. Intervals are "
        "95 % over documents, and tell nothing about training again.",
        quality="Bits that a byte of text costs (lower is better)",
        quality_axis="bits per byte",
        difference="Difference from {first} on the same documents (left of zero is better)",
        difference_axis="bits per byte, difference",
        speed="Time (median of the rounds; lines: least to most)",
        first_token="to the first token",
        further_token="for each further token",
        milliseconds="milliseconds",
        costs={
            "total_parameters": "parameters",
            "active_parameters": "of them at work on a token",
            "weight_bytes": "bytes of weights",
            "weight_bytes_per_token": "of them read for a token",
            "flops_per_token": "operations a token",
            "cache_bytes_per_token": "bytes of cache a token",
            "context": "context, tokens",
            "memory_bytes": "bytes with a full cache",
            "bytes_per_token": "bytes of text a token",
        },
        joules="joules for each further token",
        not_available="not available",
        over_seeds="{name} against {first}, trained anew with {seeds} seeds: {value:+.4f} bits per "
        "byte ({low:+.4f} to {high:+.4f}, 95 % over seeds, Student's t).",
        study="Study: {name}",
        study_text="{cases} cases, {seeds} seeds each, {tokens:,} training tokens; the same first "
        "weights and the same text for each seed. Intervals are 95 % over seeds (Student's t).",
        study_measures={
            "held_out_loss": "held-out loss, nats per token",
            "max_violation": "MaxVio (0 is even)",
            "dead_share": "share of dead experts",
            "mutual_information": "expert tells of domain, bits",
            "token_share": "token alone decides, share",
            "experts_per_token": "experts a token",
            "tokens_per_second": "tokens per second",
        },
        against="held-out loss minus that of {first}",
        note="{case}: {note}.",
        plan="What it asks of a machine: {name}",
        plan_text="{total} parameters, {active} of them at work on a token ({share:.1%}). The "
        "cache holds {cache} a token; plain attention with the same heads would hold {plain}, "
        "{times:.1f} times as much.",
        plan_parts={
            "embedding": "embedding",
            "attention": "attention",
            "dense_mlp": "dense feed-forward",
            "routed_experts": "routed experts",
            "shared_experts": "shared experts",
            "router": "routers",
            "norm": "norms",
            "lm_head": "output head",
        },
        count="parameters",
        of_all="of all",
        plan_costs={
            "format": "format",
            "weights": "weights",
            "needed": "and cache of {context:,} tokens",
            "fits": "fits (room, place)",
            "longest": "longest context",
            "read": "read for a token",
            "memory": "memory",
            "stored": "as stored",
            "yes": "yes",
            "no": "no",
        },
        speed_text="Predicted from layers of its shape with random weights, timed for "
        "{seconds:.0f} s on {threads} threads of {machine}: a prompt of {prompt:,} tokens, and one "
        "token after another behind it.",
        speed_head={
            "decode": "writing, tokens/s",
            "decode_limit": "if only memory counted",
            "prefill": "reading, tokens/s",
            "prefill_limit": "if only products counted",
        },
        roofline="Roofline: what memory and arithmetic allow, and where the model stands",
        roof="{format}: products at {peak:,.0f} GFLOP/s",
        slope="memory: {bandwidth:.1f} GB/s",
        reading="reading a prompt",
        writing="writing, token by token",
        intensity="operations for each byte that is read",
        flop_rate="GFLOP/s",
        comma=", ",
        own={},
    ),
    "zh": Words(
        title="专家们在做什么",
        made_by="由 moescope {version} 生成。所有数字见本页旁边的 JSON 文件。",
        source="来源",
        command="命令",
        layer="层 {layer}",
        expert="专家",
        domain="领域",
        model="模型",
        case="方案",
        tokens="词元",
        documents="文本",
        share="占比",
        bits="比特",
        nats="奈特/词元",
        held_out="这些文本均未用于训练。",
        maybe_seen="无从得知 {domains} 的文本是否曾用于训练，因此未必是保留文本。",
        specialization="哪些专家服务哪些领域：{model}",
        specialization_text="{domains} 个领域的 {documents:,} 篇文本，共 {tokens:,} 个词元。"
        "在层 {best}，知道一个词元的专家最能说明其领域：{bits:.3f} 比特（最多 {most:.2f}）。"
        "不看上下文，仅凭词元本身，在层 {first_layer} 决定 {first:.0%} 的选择，"
        "在层 {last_layer} 决定 {last:.0%}。",
        load="各专家为各领域出力多少（专家按所服务的领域排序）",
        relative_load="负载与平均份额之比",
        information="专家透露多少领域信息（误差线：一个标准误）",
        information_axis="比特",
        token_share="仅凭词元本身能决定多少",
        token_share_axis="占选择的比例",
        devoted="各领域最专一的专家（假设各领域同样常见）",
        typical="它比别的专家更常分到的词元",
        ablation="缺了每个专家，各领域损失多少：{model}",
        ablation_text="逐一关闭专家，其词元改由次优专家处理；"
        "{documents:,} 篇文本，{tokens:,} 个词元。"
        "{all} 项变化中，损失上升且 95 % 区间不含零的有 {worse} 项，下降的有 {better} 项；"
        "若全凭偶然，共约 {chance:.0f} 项。",
        forced_text="逐一强制所有词元使用某个专家；{documents:,} 篇文本，{tokens:,} 个词元。"
        "{all} 项变化中，损失上升且 95 % 区间不含零的有 {worse} 项，下降的有 {better} 项；"
        "若全凭偶然，共约 {chance:.0f} 项。",
        cost="各领域的损失上升多少（专家按受影响最大的领域排序）",
        cost_axis="奈特/词元",
        missed="对各领域影响最大的专家",
        interval="95 % 区间",
        cause="负载能说明专家的价值吗？",
        cause_axis="占该领域负载的比例",
        cause_text="专家占某领域词元的份额，与关闭它给该领域造成的损失之间的斯皮尔曼等级相关：{list}。",
        comparison="并排比较：{models}",
        comparison_text="所有模型使用同样的 {documents:,} 篇文本（{text_bytes:,} 字节）；"
        "轮流计时 {rounds} 轮，{machine}，{threads} 线程。区间为对文本重抽样的 95 % 区间，"
        "不反映重新训练带来的差异。",
        quality="每字节文本需要的比特数（越低越好）",
        quality_axis="比特/字节",
        difference="同样文本上与 {first} 之差（零的左侧更好）",
        difference_axis="比特/字节之差",
        speed="时间（各轮中位数；线段为最小到最大）",
        first_token="到第一个词元",
        further_token="之后每个词元",
        milliseconds="毫秒",
        costs={
            "total_parameters": "参数",
            "active_parameters": "其中每词元用到",
            "weight_bytes": "权重字节数",
            "weight_bytes_per_token": "其中每词元读取",
            "flops_per_token": "每词元运算次数",
            "cache_bytes_per_token": "每词元缓存字节数",
            "context": "上下文（词元）",
            "memory_bytes": "缓存占满时的字节数",
            "bytes_per_token": "每词元对应的文本字节数",
        },
        joules="之后每个词元的焦耳数",
        not_available="无法获得",
        over_seeds="{name} 与 {first} 相比，用 {seeds} 个随机种子重新训练：{value:+.4f} 比特/字节"
        "（{low:+.4f} 到 {high:+.4f}，对种子的 95 % 区间，学生 t 分布）。",
        study="研究：{name}",
        study_text="{cases} 种方案，每种 {seeds} 个随机种子，训练 {tokens:,} 个词元；"
        "同一种子的初始权重与文本顺序都相同。区间为对种子的 95 % 区间（学生 t 分布）。",
        study_measures={
            "held_out_loss": "保留文本损失（奈特/词元）",
            "max_violation": "MaxVio（0 为均衡）",
            "dead_share": "闲置专家占比",
            "mutual_information": "专家透露的领域信息（比特）",
            "token_share": "仅凭词元决定的比例",
            "experts_per_token": "每词元专家数",
            "tokens_per_second": "词元/秒",
        },
        against="保留文本损失减去 {first} 的损失",
        note="{case}：{note}。",
        plan="对机器的要求：{name}",
        plan_text="共 {total} 参数，每个词元用到 {active}（{share:.1%}）。"
        "每个词元的缓存为 {cache}；同样的头若用普通注意力需要 {plain}，是其 {times:.1f} 倍。",
        plan_parts={
            "embedding": "嵌入",
            "attention": "注意力",
            "dense_mlp": "稠密前馈",
            "routed_experts": "路由专家",
            "shared_experts": "共享专家",
            "router": "路由器",
            "norm": "归一化",
            "lm_head": "输出层",
        },
        count="参数",
        of_all="占比",
        plan_costs={
            "format": "格式",
            "weights": "权重",
            "needed": "连同 {context:,} 词元的缓存",
            "fits": "能否放进（容量，位置）",
            "longest": "最长上下文",
            "read": "每词元读取",
            "memory": "内存",
            "stored": "文件原样",
            "yes": "能",
            "no": "不能",
        },
        speed_text="用同样形状、随机权重的若干层，在 {machine} 的 {threads} 个线程上"
        "计时 {seconds:.0f} 秒得出的预测：先读 {prompt:,} 个词元的提示，再逐个生成。",
        speed_head={
            "decode": "生成（词元/秒）",
            "decode_limit": "若只受内存限制",
            "prefill": "读取（词元/秒）",
            "prefill_limit": "若只受矩阵乘限制",
        },
        roofline="屋顶线：内存与算力允许的上限，以及模型所在的位置",
        roof="{format}：矩阵乘 {peak:,.0f} GFLOP/s",
        slope="内存：{bandwidth:.1f} GB/s",
        reading="读取提示",
        writing="逐词元生成",
        intensity="每读一字节的运算次数",
        flop_rate="GFLOP/s",
        comma="、",
        own={
            "arithmetic": "算术",
            "code": "代码",
            "poetry": "诗词",
            "prose": "散文小说",
            "translation": "翻译",
            "definitions": "词语释义",
            "documentation": "软件文档",
            "models": "语言模型",
            "routers": "路由方式",
            "granularity": "专家的粗细",
            "shared": "共享专家",
            "balance": "负载均衡",
            "sigmoid, bias": "sigmoid，偏置",
            "softmax, auxiliary loss": "softmax，辅助损失",
            "softmax in groups": "softmax，分组",
            "expert choice": "专家选词元",
            "hash of the token": "词元哈希",
            "random map": "随机映射",
            "nothing": "无",
            "bias": "偏置",
            "bias and sequence loss": "偏置加序列损失",
            "auxiliary loss {}": "辅助损失 {}",
            "{} of {}": "选 {}，共 {}",
            "{} shared, {} of {}": "共享 {}，选 {}，共 {}",
            "experts per token are learned": "每词元的专家数由学习得来",
            "an expert's choice depends on later tokens, so its loss is not that of generation": (
                "专家的选择取决于后面的词元，所以这里的损失不等于生成时的损失"
            ),
            "trained with choices that see later tokens, judged with thresholds that do not": (
                "训练时的选择看得到后面的词元，评测时按阈值选，看不到"
            ),
            "control: nothing is learned": "对照：路由器什么也不学",
        },
    ),
}
