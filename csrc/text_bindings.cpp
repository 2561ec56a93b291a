// Python's view of the text kernels: lists of strings in, ids end to end and their numbers out.
#include "text_bindings.h"

#include <pybind11/numpy.h>

#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

#include "byte_bpe.h"

namespace py = pybind11;
namespace ms = megatron_speech;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

ms::ByteBpe make(int pattern, const Array<int32_t>& byte_ids, const Array<int32_t>& merges,
                 const Array<uint8_t>& classes, const py::list& pieces) {
    if (pattern < 0 || pattern > 2) throw std::invalid_argument("there is no such split pattern");
    if (byte_ids.size() != 256) throw std::invalid_argument("byte_ids is not one id for each byte");
    if (merges.ndim() != 2 || merges.shape(0) != 3) throw std::invalid_argument("merges is not [3, M]");
    const int64_t n = merges.shape(1);
    const int32_t* rows = merges.data();
    ms::ByteBpe bpe(static_cast<ms::SplitPattern>(pattern), byte_ids.data(), rows, rows + n, rows + 2 * n, n,
                    classes.data(), classes.size());
    for (const py::handle& item : pieces) {
        const auto [bytes, id] = item.cast<std::pair<py::bytes, int32_t>>();
        bpe.add_piece(bytes.cast<std::string_view>(), id);
    }
    return bpe;
}

std::pair<py::array_t<int32_t>, py::array_t<int32_t>> encode(ms::ByteBpe& bpe, const py::list& texts) {
    static thread_local std::vector<int32_t> ids;  // grows once, and not with every batch
    ids.clear();
    py::array_t<int32_t> ends(static_cast<py::ssize_t>(texts.size()));
    int32_t* end = ends.mutable_data();
    for (const py::handle& item : texts) {
        Py_ssize_t size = 0;
        const char* data = PyUnicode_AsUTF8AndSize(item.ptr(), &size);
        if (data == nullptr) throw py::error_already_set();
        bpe.encode({data, static_cast<size_t>(size)}, ids);
        if (ids.size() > 0x7FFFFFFF) throw std::length_error("a batch of texts has more than 2^31 ids");
        *end++ = static_cast<int32_t>(ids.size());
    }
    return {py::array_t<int32_t>(static_cast<py::ssize_t>(ids.size()), ids.data()), ends};
}

}  // namespace

namespace megatron_speech {

void register_text(py::module_& m) {
    // Keeps what it has seen: one object for one thread (the GIL is held throughout).
    py::class_<ByteBpe>(m, "ByteBpe")
        .def(py::init(&make), py::arg("pattern"), py::arg("byte_ids"), py::arg("merges"), py::arg("classes"),
             py::arg("pieces"))
        .def("encode", &encode, py::arg("texts"));
}

}  // namespace megatron_speech
