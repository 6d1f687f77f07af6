// torch.ops.momentkv_cpu.*: operators that check tensors (tensors.h) and run kernels on them (run.h).

#include <Python.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <vector>

#include "run.h"
#include "tensors.h"

namespace momentkv {
namespace {

void write(MOMENTKV_CACHE, const Tensor& key, const Tensor& value, const Tensor& slots, const OptionalTensor& observed) {
  Write w{};
  w.cache = cache_of(kv, key_scale, value_scale);
  set_write(w, kv, key, value, slots, observed);
  const Kernels& k = kernels();
  in_parallel(w.cache.heads, [&](int64_t head) { k.zero_fresh_pages(w, head); });
  in_parallel(w.tokens, [&](int64_t token) { k.write(w, token); });
}

void attend(MOMENTKV_CACHE, const Tensor& query, const Tensor& output, const OptionalTensor& lse, MOMENTKV_ATTEND_WORK,
            double scale, double softcap, bool corrected, MOMENTKV_RECORD, const OptionalTensor& stored, int64_t store_pages,
            at::IntArrayRef packed, MOMENTKV_HEADS, const OptionalTensor& weights, const OptionalTensor& observed) {
  run(attend_of(kv, key_scale, value_scale, query, output, lse, MOMENTKV_ATTEND_WORK_GIVEN, scale, softcap,
                {corrected, MOMENTKV_RECORD_GIVEN}, stored, store_pages, packed, MOMENTKV_HEADS_GIVEN, weights, observed));
}

void observe(MOMENTKV_CACHE, const Tensor& observed, const Tensor& query, const Tensor& lse, MOMENTKV_ATTEND_WORK,
             double scale, double softcap, const OptionalTensor& stored, int64_t store_pages, at::IntArrayRef packed,
             MOMENTKV_HEADS, const OptionalTensor& weights) {
  const AttendTensors work MOMENTKV_ATTEND_WORK_GIVEN;
  Attend a{};
  a.cache = cache_of(kv, key_scale, value_scale);
  set_queries(a, kv, query, work, scale);
  a.softcap = float(softcap);
  a.num_evicted = data_of<float>(work.num_evicted, "num_evicted", {a.rows});
  set_moment_pages(a, work);
  set_store(a, stored, store_pages, packed, MOMENTKV_HEADS_GIVEN, observed);
  check_rows(a, query.size(0));
  a.lse = data_of<float>(lse, "lse", {query.size(0), a.query_heads});
  set_observing(a, work, weights);
  TORCH_CHECK(a.observe_from != nullptr && a.restart != nullptr, "observe needs observe_from and restart");
  const Kernels& k = kernels();
  in_parallel(a.rows * a.cache.heads, [&](int64_t i) {
    k.observe(a, item_of(a, i / a.cache.heads, i % a.cache.heads), scratch(k.observe_scratch(a)));
  });
}

void consolidate(MOMENTKV_CACHE, MOMENTKV_RETIRE_WORK, const OptionalTensor& score, const OptionalTensor& observed,
                 int64_t sink_tokens, double attention_weight, MOMENTKV_RECORD, const OptionalTensor& stored,
                 int64_t run_tokens, int64_t store_tokens, at::IntArrayRef packed, MOMENTKV_HEADS, const OptionalTensor& feedback) {
  auto c = consolidate_of(kv, key_scale, value_scale, MOMENTKV_RETIRE_WORK_GIVEN, score, observed,
                          {sink_tokens, attention_weight, run_tokens, store_tokens}, MOMENTKV_RECORD_GIVEN, stored, packed,
                          MOMENTKV_HEADS_GIVEN, feedback);
  run(c);
}

// attends: of each AttendWork its `arguments()` and `stored`; retires: of each RetireWork likewise; events: which of all operations
// are of those. Seconds of each.
std::vector<double> rounds(MOMENTKV_CACHE, const Tensor& query, const Tensor& output, const OptionalTensor& lse,
                           const c10::List<OptionalTensor>& attends, const c10::List<OptionalTensor>& retires, at::IntArrayRef events,
                           double scale, double softcap, bool corrected, bool corrected_covariance, MOMENTKV_RECORD,
                           const OptionalTensor& observed, int64_t sink_tokens, double attention_weight, int64_t store_pages,
                           int64_t run_tokens, int64_t store_tokens, at::IntArrayRef packed, MOMENTKV_HEADS,
                           const OptionalTensor& feedback) {
  constexpr size_t kOfAttend = 9, kOfRetire = 5;
  TORCH_CHECK(attends.size() % kOfAttend == 0 && retires.size() == events.size() * kOfRetire, "rounds has ", attends.size(),
              " tensors of attends and ", retires.size(), " of ", events.size(), " events");
  const RecordArguments record MOMENTKV_RECORD_GIVEN;
  RecordArguments correction = record;
  correction.has_covariance = corrected_covariance;
  const std::vector<OptionalTensor> attended = attends.vec(), retired = retires.vec();
  std::vector<std::atomic<double>> seconds(events.size());
  std::vector<Step> steps(events.size() + attends.size() / kOfAttend);
  auto* a = attended.data();
  auto* r = retired.data();
  for (size_t i = 0, event = 0; i < steps.size(); ++i) {
    if (event < events.size() && events[event] == int64_t(i)) {
      steps[i].params = consolidate_of(kv, key_scale, value_scale, {r[0].value(), r[1].value(), r[2].value(), r[3].value()}, {}, observed,
                                       {sink_tokens, attention_weight, run_tokens, store_tokens}, record, r[4], packed,
                                       MOMENTKV_HEADS_GIVEN, feedback);
      steps[i].seconds = &seconds[event++];
      r += kOfRetire;
    } else {
      TORCH_CHECK(a < attended.data() + attended.size(), "operation ", i, " of rounds is no event and has no tensors");
      const AttendTensors work{a[0].value(), a[1].value(), a[2].value(), a[3].value(), a[4].value(), a[5].value(), a[6], a[7]};
      steps[i].params = attend_of(kv, key_scale, value_scale, query, output, lse, work, scale, softcap, {corrected, correction}, a[8],
                                  store_pages, packed, MOMENTKV_HEADS_GIVEN, {}, a[6] ? observed : OptionalTensor());
      a += kOfAttend;
    }
  }
  run(steps);
  return {seconds.begin(), seconds.end()};
}

// Keys and values of quantised store pages as float32, [rows, heads, slots, head_dim] each.
std::tuple<Tensor, Tensor> read_store(const Tensor& kv, const Tensor& pages, at::IntArrayRef packed) {
  TORCH_CHECK(pages.dim() == 2, "pages has shape ", pages.sizes(), "; it must be [rows, pages]");
  ReadStore r{cache_of(kv, 1, 1), {}, data_of<int64_t>(pages, "pages", pages.sizes()), pages.size(1), nullptr, nullptr};
  r.packed = packed_of(r.cache, packed);
  TORCH_CHECK(r.packed.bits != 0, "packed must say how the store is quantised");
  const int64_t rows = pages.size(0), slots = pages.size(1) * r.packed.page_tiles * 8;
  const auto floats = kv.options().dtype(at::kFloat);
  const Tensor keys = at::empty({rows, r.cache.heads, slots, r.cache.head_dim}, floats), values = at::empty_like(keys);
  r.keys = keys.data_ptr<float>();
  r.values = values.data_ptr<float>();
  const Kernels& k = kernels();
  in_parallel(rows * r.cache.heads, [&](int64_t i) { k.read_store(r, i); });
  return {keys, values};
}

std::string isa() { return kernels().name; }

}  // namespace
}  // namespace momentkv

// Arguments of one meaning stand in one order here and in csrc/cuda.
TORCH_LIBRARY(momentkv_cpu, m) {
  m.def("write(" MOMENTKV_CACHE_SCHEMA("Tensor(a!)") ", Tensor key, Tensor value, Tensor slots, Tensor(b!)? observed) -> ()", &momentkv::write);
  m.def(
      "attend(" MOMENTKV_CACHE_SCHEMA("Tensor") ", Tensor query, Tensor(a!) output, Tensor(b!)? lse, " MOMENTKV_ATTEND_WORK_SCHEMA
      ", float scale, float softcap, bool corrected, " MOMENTKV_RECORD_SCHEMA
      ", Tensor? stored, int store_pages, int[] packed, " MOMENTKV_HEADS_SCHEMA ", Tensor(c!)? weights, Tensor(d!)? observed) -> ()",
      &momentkv::attend);
  m.def(
      "observe(" MOMENTKV_CACHE_SCHEMA("Tensor") ", Tensor(a!) observed, Tensor query, Tensor lse, " MOMENTKV_ATTEND_WORK_SCHEMA
      ", float scale, float softcap, Tensor? stored, int store_pages, int[] packed, " MOMENTKV_HEADS_SCHEMA ", Tensor(b!)? weights) -> ()",
      &momentkv::observe);
  m.def(
      "consolidate(" MOMENTKV_CACHE_SCHEMA("Tensor(a!)") ", " MOMENTKV_RETIRE_WORK_SCHEMA
      ", Tensor? score, Tensor(b!)? observed, int sink_tokens, float attention_weight, " MOMENTKV_RECORD_SCHEMA
      ", Tensor? stored, int run_tokens, int store_tokens, int[] packed, " MOMENTKV_HEADS_SCHEMA ", Tensor? feedback) -> ()",
      &momentkv::consolidate);
  m.def(
      "rounds(" MOMENTKV_CACHE_SCHEMA("Tensor(a!)") ", Tensor query, Tensor(b!) output, Tensor(c!)? lse, Tensor?[] attends, "
      "Tensor?[] retires, int[] events, float scale, float softcap, bool corrected, bool corrected_covariance, " MOMENTKV_RECORD_SCHEMA
      ", Tensor(d!)? observed, int sink_tokens, float attention_weight, int store_pages, int run_tokens, int store_tokens, "
      "int[] packed, " MOMENTKV_HEADS_SCHEMA ", Tensor? feedback) -> float[]",
      &momentkv::rounds);
  m.def("read_store(Tensor kv, Tensor pages, int[] packed) -> (Tensor, Tensor)", &momentkv::read_store);
  m.def("isa() -> str", &momentkv::isa);
}

// `import momentkv_vllm._cpu` registers the operators above.
PyMODINIT_FUNC PyInit__cpu() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
