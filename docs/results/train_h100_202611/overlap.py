"""What could running AdamW beside matrix products gain at most?

150 products of 8192 x 11264 x 2048 in bf16 (some 87 ms) and 17 GB of reads and writes, which is AdamW's traffic at 1B with means in int8 and
gradients in bf16, as CUDA graphs: one after the other, and at once on two streams.
"""

import statistics

import torch

torch.manual_seed(0)
x = torch.randn(8192, 2048, device="cuda").bfloat16()
w = (torch.randn(11264, 2048, device="cuda") * 0.02).bfloat16()
y = torch.empty(8192, 11264, device="cuda", dtype=torch.bfloat16)
n_parameters, bytes_per_parameter, n_passes = 952_000_000, 18, 4
source = torch.randn(n_parameters * bytes_per_parameter // (8 * n_passes), device="cuda")
target = torch.empty_like(source)


def products():
    for _ in range(150):
        torch.mm(x, w.t(), out=y)


def memory():
    for _ in range(n_passes):
        torch.add(source, 1.0, out=target)


def at_once(priority):
    side, main = torch.cuda.Stream(priority=priority), torch.cuda.current_stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        memory()
    products()
    main.wait_stream(side)


def captured(run):
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def timed(graph, n=12):
    for _ in range(4):
        graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


graphs = {
    "products": captured(products),
    "memory": captured(memory),
    "one after the other": captured(lambda: (products(), memory())),
    "at once": captured(lambda: at_once(0)),
    "at once, memory first": captured(lambda: at_once(-1)),
}
for _ in range(3):
    for name, graph in graphs.items():
        ms = timed(graph)
        print(f"{name}: {statistics.median(ms):.2f} ms ({min(ms):.2f}-{max(ms):.2f})")
