// Python's view of the CPU kernels: NumPy arrays in, NumPy arrays out. Types, shapes and contiguity are checked
// here, so that a wrong call is an exception and never a wrong address; what values mean is checked in Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "kernels.h"

namespace py = pybind11;
namespace ms = megatron_speech;

namespace {

// Raised together with INTERFACE in megatron_speech/ops/extension.py whenever a signature changes.
constexpr int kInterface = 2;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
void require_size(const Array<T>& array, int64_t size, const char* name) {
    if (array.size() != size) {
        throw std::invalid_argument(std::string(name) + " has " + std::to_string(array.size()) + " elements, needs " +
                                    std::to_string(size));
    }
}

template <typename T>
py::array_t<T> to_numpy(std::vector<T>&& values) {
    auto* owner = new std::vector<T>(std::move(values));
    py::capsule release(owner, [](void* p) { delete static_cast<std::vector<T>*>(p); });
    return py::array_t<T>(static_cast<py::ssize_t>(owner->size()), owner->data(), release);
}

ms::LossMaskProblem problem_of(const Array<int64_t>& tokens, const Array<int32_t>& document_lengths,
                               const Array<int32_t>& row_pointers, const Array<int32_t>& document_groups,
                               const Array<uint8_t>& modality_table, int64_t prompt_end_id, const Array<float>& weights,
                               Array<int64_t>& labels, Array<float>& loss_weights, Array<int64_t>& position_ids,
                               Array<int32_t>& group_ids, Array<int32_t>& cu_seqlens, Array<int64_t>& counts,
                               Array<int64_t>& invalid) {
    if (tokens.ndim() != 2 || tokens.shape(1) < 2) throw std::invalid_argument("tokens is not [B, S + 1] with S >= 1");
    const int64_t rows = tokens.shape(0), seq_length = tokens.shape(1) - 1, documents = document_lengths.size();
    if (seq_length > ms::kMaxSeqLength || rows * seq_length > INT32_MAX) {
        throw std::invalid_argument("the batch has more positions than cu_seqlens (int32) can number");
    }
    if (modality_table.size() < 1) throw std::invalid_argument("modality_table is empty");
    require_size(row_pointers, rows + 1, "row_pointers");
    require_size(document_groups, documents, "document_groups");
    require_size(weights, 2 * ms::kModalities, "weights");
    require_size(labels, rows * seq_length, "labels");
    require_size(loss_weights, rows * seq_length, "loss_weights");
    require_size(position_ids, rows * seq_length, "position_ids");
    require_size(group_ids, rows * seq_length, "group_ids");
    require_size(cu_seqlens, documents + rows + 1, "cu_seqlens");
    require_size(counts, ms::kCounts, "counts");
    require_size(invalid, 1, "invalid");
    ms::LossMaskProblem p{};
    p.tokens = tokens.data();
    p.document_lengths = document_lengths.data();
    p.row_pointers = row_pointers.data();
    p.document_groups = document_groups.data();
    p.modality_table = modality_table.data();
    p.rows = rows;
    p.seq_length = seq_length;
    p.documents = documents;
    p.vocabulary = modality_table.size();
    p.prompt_end_id = prompt_end_id;
    for (int i = 0; i < 2 * ms::kModalities; ++i) p.weights[i] = weights.data()[i];
    p.labels = labels.mutable_data();
    p.loss_weights = loss_weights.mutable_data();
    p.position_ids = position_ids.mutable_data();
    p.group_ids = group_ids.mutable_data();
    p.cu_seqlens = cu_seqlens.mutable_data();
    p.counts = counts.mutable_data();
    p.invalid = invalid.mutable_data();
    return p;
}

bool loss_mask(const Array<int64_t>& tokens, const Array<int32_t>& document_lengths, const Array<int32_t>& row_pointers,
               const Array<int32_t>& document_groups, const Array<uint8_t>& modality_table, int64_t prompt_end_id,
               const Array<float>& weights, Array<int64_t> labels, Array<float> loss_weights,
               Array<int64_t> position_ids, Array<int32_t> group_ids, Array<int32_t> cu_seqlens, Array<int64_t> counts,
               Array<int64_t> invalid) {
    const auto p = problem_of(tokens, document_lengths, row_pointers, document_groups, modality_table, prompt_end_id,
                              weights, labels, loss_weights, position_ids, group_ids, cu_seqlens, counts, invalid);
    // The row pointers are what a wrong address could come from.
    if (p.row_pointers[0] != 0 || p.row_pointers[p.rows] != p.documents) {
        throw std::invalid_argument("row_pointers do not run from 0 to the number of documents");
    }
    for (int64_t row = 0; row < p.rows; ++row) {
        if (p.row_pointers[row] > p.row_pointers[row + 1]) throw std::invalid_argument("row_pointers decrease");
    }
    for (int64_t d = 0; d < p.documents; ++d) {
        if (p.document_lengths[d] < 0) throw std::invalid_argument("a document length is negative");
    }
    py::gil_scoped_release release;
    return ms::loss_mask_cpu(p);
}

void loss_mask_emulated(const Array<int64_t>& tokens, const Array<int32_t>& document_lengths,
                        const Array<int32_t>& row_pointers, const Array<int32_t>& document_groups,
                        const Array<uint8_t>& modality_table, int64_t prompt_end_id, const Array<float>& weights,
                        Array<int64_t> labels, Array<float> loss_weights, Array<int64_t> position_ids,
                        Array<int32_t> group_ids, Array<int32_t> cu_seqlens, Array<int64_t> counts,
                        Array<int64_t> invalid, int threads, bool reversed) {
    const auto p = problem_of(tokens, document_lengths, row_pointers, document_groups, modality_table, prompt_end_id,
                              weights, labels, loss_weights, position_ids, group_ids, cu_seqlens, counts, invalid);
    py::gil_scoped_release release;
    ms::loss_mask_emulated(p, threads, reversed);
}

py::tuple pack_cut(const Array<int32_t>& lengths, int64_t seq_length) {
    if (seq_length < 1) throw std::invalid_argument("seq_length is below 1");
    ms::PackedSegments packed;
    {
        py::gil_scoped_release release;
        packed = ms::pack_cut(lengths.data(), lengths.size(), seq_length);
    }
    return py::make_tuple(to_numpy(std::move(packed.seq_ptr)), to_numpy(std::move(packed.position)),
                          to_numpy(std::move(packed.start)), to_numpy(std::move(packed.length)));
}

py::tuple pack_fit(const Array<int32_t>& lengths, int64_t seq_length, int64_t open_bins) {
    if (seq_length < 1 || open_bins < 1) throw std::invalid_argument("seq_length or open_bins is below 1");
    ms::PackedSegments packed;
    std::vector<int64_t> oversize;
    {
        py::gil_scoped_release release;
        packed = ms::pack_fit(lengths.data(), lengths.size(), seq_length, open_bins, &oversize);
    }
    return py::make_tuple(to_numpy(std::move(packed.seq_ptr)), to_numpy(std::move(packed.position)),
                          to_numpy(std::move(packed.start)), to_numpy(std::move(packed.length)),
                          to_numpy(std::move(oversize)));
}

py::array_t<int64_t> blend_order(const Array<int32_t>& costs, const Array<int64_t>& ptr, const Array<double>& shares,
                                 int64_t stop) {
    const int64_t strata = shares.size();
    if (strata < 1) throw std::invalid_argument("shares is empty");
    require_size(ptr, strata + 1, "ptr");
    if (ptr.data()[0] != 0 || ptr.data()[strata] != costs.size()) {
        throw std::invalid_argument("ptr does not run from 0 to the number of costs");
    }
    for (int64_t k = 0; k < strata; ++k) {
        if (ptr.data()[k] > ptr.data()[k + 1]) throw std::invalid_argument("ptr decreases");
        if (!(shares.data()[k] > 0)) throw std::invalid_argument("a share is not positive");
    }
    for (int64_t i = 0; i < costs.size(); ++i) {
        if (costs.data()[i] < 0) throw std::invalid_argument("a cost is negative");
    }
    std::vector<int64_t> order;
    {
        py::gil_scoped_release release;
        order = ms::blend_order(costs.data(), ptr.data(), shares.data(), strata, stop);
    }
    return to_numpy(std::move(order));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU kernels of megatron_speech; use megatron_speech.ops and megatron_speech.data instead.";
    m.attr("interface") = kInterface;
    const auto fixed = [](const char* name) { return py::arg(name).noconvert(); };
    m.def("loss_mask", &loss_mask, fixed("tokens"), fixed("document_lengths"), fixed("row_pointers"),
          fixed("document_groups"), fixed("modality_table"), py::arg("prompt_end_id"), fixed("weights"),
          fixed("labels"), fixed("loss_weights"), fixed("position_ids"), fixed("group_ids"), fixed("cu_seqlens"),
          fixed("counts"), fixed("invalid"), "False when a token has no modality: the outputs are not to be used.");
    m.def("loss_mask_emulated", &loss_mask_emulated, fixed("tokens"), fixed("document_lengths"), fixed("row_pointers"),
          fixed("document_groups"), fixed("modality_table"), py::arg("prompt_end_id"), fixed("weights"),
          fixed("labels"), fixed("loss_weights"), fixed("position_ids"), fixed("group_ids"), fixed("cu_seqlens"),
          fixed("counts"), fixed("invalid"), py::arg("threads"), py::arg("reversed"),
          "The code of the CUDA kernels, run thread by thread; for tests.");
    m.def("pack_cut", &pack_cut, fixed("lengths"), py::arg("seq_length"), "(seq_ptr, position, start, length)");
    m.def("pack_fit", &pack_fit, fixed("lengths"), py::arg("seq_length"), py::arg("open_bins"),
          "(seq_ptr, position, start, length, oversize)");
    m.def("blend_order", &blend_order, fixed("costs"), fixed("ptr"), fixed("shares"), py::arg("stop"),
          "Indices into costs, in the order of training.");
}
