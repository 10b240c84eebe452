// A group of LoRA projections forward and backward as one node of torch's autograd, without Python in between.
//
// Where its products are small the host, not the device, decides how long a layer takes, and an operation from here costs
// it a few microseconds, in place of ten and more from Python.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "group.h"

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// What is derived once may be looked at in a second derivative, but not derived again.
struct Once : public torch::autograd::Function<Once> {
    static variable_list forward(AutogradContext* ctx, at::TensorList results) { return results.vec(); }
    static variable_list backward(AutogradContext* ctx, variable_list given) {
        TORCH_CHECK(false, "trying to differentiate twice a function that was marked with @once_differentiable");
    }
};

variable_list once_differentiable(variable_list results) {
    std::vector<Tensor> defined;
    for (const auto& result : results) {
        if (result.defined()) defined.push_back(result.detach().requires_grad_());
    }
    const variable_list marked = Once::apply(at::TensorList(defined));
    size_t next = 0;
    for (auto& result : results) {
        if (result.defined()) result = marked[next++];
    }
    return results;
}

Tensors every_other(at::TensorList tensors, size_t first) {
    Tensors found;
    for (size_t i = first; i < tensors.size(); i += 2) found.push_back(tensors[i]);
    return found;
}

struct LoraGroup : public torch::autograd::Function<LoraGroup> {
    // adapters: a and b of each in turn, in the order in which lora/autograd.py saves them.
    // remade: what is kept in x's place, or nothing.
    static variable_list forward(AutogradContext* ctx, const Tensor& x, at::TensorList adapters, at::TensorList remade,
                                 const c10::intrusive_ptr<Group>& group) {
        const auto as = every_other(adapters, 0), bs = every_other(adapters, 1);
        Tensors outputs;
        Tensor kept, s;
        {
            Plain plain;
            const auto size = static_cast<int64_t>(c10::elementSize(group->compute));
            const bool once = group->compute == group->lora && x.element_size() >= size;
            kept = once ? x.to(group->compute) : x;
            auto sizes = x.sizes().vec();
            Tensors ys;
            for (const auto& projection : group->projections) {
                sizes.back() = projection.out_features;
                outputs.push_back(at::empty(sizes, x.options().dtype(group->out)));
                ys.push_back(outputs.back().view({-1, projection.out_features}));
            }
            s = project_all(kept.reshape({-1, kept.size(-1)}), ys, {}, pack(*group, as, bs), *group);
        }
        ctx->set_materialize_grads(false);
        ctx->saved_data["group"] = c10::IValue::make_capsule(group);
        ctx->saved_data["shape"] = x.sizes().vec();
        ctx->saved_data["dtype"] = static_cast<int64_t>(x.scalar_type());
        if (!remade.empty()) kept = remade[0];
        variable_list saved{group->keeps_x() ? kept : Tensor(), group->keeps_s() ? s : Tensor()};
        saved.insert(saved.end(), adapters.begin(), adapters.end());
        ctx->save_for_backward(std::move(saved));
        return outputs;
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& given) {
        const auto group = c10::static_intrusive_pointer_cast<Group>(ctx->saved_data["group"].toCapsule());
        const auto saved = ctx->get_saved_variables();
        group->check.call<void>();
        const auto as = every_other(saved, 2), bs = every_other(saved, 3);
        const bool differentiable = at::GradMode::is_enabled();
        variable_list results;
        {
            Plain plain;
            at::NoGradGuard no_grad;
            const auto shape = ctx->saved_data["shape"].toIntVector();
            results = derive(given, shape, static_cast<ScalarType>(ctx->saved_data["dtype"].toInt()),
                             made_again(saved[0], group->made), saved[1], as, bs, *group);
        }
        if (differentiable) results = once_differentiable(std::move(results));
        results.resize(results.size() + (group->made.empty() ? 1 : 2));  // what is kept in x's place, the group
        return results;
    }
};

using Given = std::optional<Tensor>;
using GivenScalings = std::pair<double, Given>;

Scalings scalings_of(const GivenScalings& given) { return {given.first, given.second.value_or(Tensor())}; }

std::vector<Given> or_none(const Tensors& tensors) {
    std::vector<Given> found;
    for (const auto& tensor : tensors) found.push_back(tensor.defined() ? Given(tensor) : Given());
    return found;
}

Tensors or_undefined(const std::vector<Given>& tensors) {
    Tensors found;
    for (const auto& tensor : tensors) found.push_back(tensor.value_or(Tensor()));
    return found;
}

// A group, and its adapters' parameters, for any number of calls. The arguments' dtypes and sizes are checked in Python.
struct Projections {
    Group group;
    Tensors as, bs;

    Projections(const std::vector<Given>& weights, const std::vector<py::object>& decoders, const std::vector<Given>& biases,
                const std::vector<int64_t>& out_features, const std::vector<int64_t>& counts, Tensors given_as,
                Tensors given_bs, const std::vector<double>& scalings, ScalarType compute, ScalarType lora, ScalarType out)
        : as(std::move(given_as)), bs(std::move(given_bs)) {
        let_go().drop();
        group.compute = compute;
        group.lora = lora;
        group.out = out;
        size_t adapter = 0;
        for (size_t i = 0; i < weights.size(); ++i) {
            Projection projection{weights[i].value_or(Tensor()), Held(decoders[i]), biases[i].value_or(Tensor()),
                                  counts[i] ? scalings[adapter] : 1.0, out_features[i], counts[i], 0};
            for (int64_t j = 0; j < counts[i]; ++j, ++adapter) {
                projection.rank = std::max(projection.rank, as[adapter].size(0));
            }
            group.rank += projection.rank;
            group.projections.push_back(std::move(projection));
        }
    }

    // The outputs as a node of autograd, which has a group of its own.
    std::vector<Tensor> apply(const Tensor& x, py::object check, py::object dx, const Given& source, std::string made,
                              std::shared_ptr<Rows> rows, std::shared_ptr<Owned> owned,
                              const GivenScalings& mixed_scalings) const {
        let_go().drop();
        const auto own = c10::make_intrusive<Group>(group);
        own->check = Held(std::move(check));
        own->dx = Held(std::move(dx));
        own->needs_x = x.requires_grad();
        own->made = std::move(made);
        if (rows) own->mixed = Mixed{std::move(rows), std::move(owned), scalings_of(mixed_scalings)};
        Tensors adapters;
        for (size_t k = 0; k < as.size(); ++k) {
            own->trains_a.push_back(as[k].requires_grad());
            own->trains_b.push_back(bs[k].requires_grad());
            adapters.push_back(as[k]);
            adapters.push_back(bs[k]);
        }
        py::gil_scoped_release release;
        Tensors remade;
        if (source) remade.push_back(*source);
        return LoraGroup::apply(x, at::TensorList(adapters), at::TensorList(remade), own);
    }

    // Scaled and joined, as the products take them: a of all, and b of each projection.
    std::pair<Given, std::vector<Given>> pack() const {
        const Packed packed = ::pack(group, as, bs);
        return {or_none({packed.a})[0], or_none(packed.b)};
    }

    // `forward_into`, `backward_without_input` and `down_gradients` of lora/library.py; of the adapters' gradients those
    // of b and those of a.
    Given project(Tensors outputs, const Tensor& x, const Given& a, const std::vector<Given>& ups, const Given& s) const {
        const Packed packed{a.value_or(Tensor()), or_undefined(ups)};
        return or_none({project_all(x, outputs, s.value_or(Tensor()), packed, group)})[0];
    }

    std::tuple<Given, Given, std::vector<Given>> derive(const Given& s, const std::vector<Given>& given, const Given& a,
                                                        const std::vector<Given>& ups, const std::optional<ScalarType>& dx_dtype,
                                                        const Flags& trains_b) const {
        const Packed packed{a.value_or(Tensor()), or_undefined(ups)};
        const Tensors dys = or_undefined(given);
        Tensors results(1 + 2 * as.size());
        const Tensor ds = up_gradients(dys, s.value_or(Tensor()), packed, bs, trains_b, group, results);
        Tensor dx;
        if (dx_dtype) dx = input_gradient(dys, ds, group, packed, *dx_dtype);
        const auto found = or_none({dx, ds});
        return {found[0], found[1], or_none(every_other(results, 2))};
    }

    std::vector<Given> down_gradients(const Tensor& ds, const Tensor& x, const Flags& trains_a) const {
        Tensors results(1 + 2 * as.size());
        ::down_gradients(ds, x, as, trains_a, group, results);
        return or_none(every_other(results, 1));
    }
};

// The parts of a mixed batch for what is Python's: see mixed.h.
void bind_mixed(py::module_& module) {
    using Release = py::call_guard<py::gil_scoped_release, Plain>;
    py::class_<Rows, std::shared_ptr<Rows>>(module, "Rows", py::module_local())
        .def(py::init([](int64_t rows, int64_t owners, int64_t count, const Given& slots, const Given& taken,
                         const Given& empty, const Given& places) {
            const Tensor none;
            return std::make_shared<Rows>(rows, owners, count, slots.value_or(none), taken.value_or(none),
                                          empty.value_or(none), places.value_or(none));
        }))
        .def("multiply",
             [](const Rows& self, const Tensor& t, const Tensor& stack, const Given& out, const Given& bias) {
                 return self.multiply(t, stack, out.value_or(Tensor()), bias.value_or(Tensor()));
             },
             py::arg("t"), py::arg("stack"), py::arg("out") = py::none(), py::arg("bias") = py::none(), Release())
        .def("both_gradients", &Rows::both_gradients, Release())
        .def("outer", &Rows::outer, Release());
    py::class_<Owned, std::shared_ptr<Owned>>(module, "Owned", py::module_local())
        .def(py::init<int64_t, std::vector<int64_t>, std::vector<int64_t>>())
        .def("pack",
             [](const Owned& self, const Tensors& as, const Tensors& bs, const GivenScalings& scalings, ScalarType dtype) {
                 const auto packed = self.pack(as, bs, scalings_of(scalings), dtype);
                 return std::make_pair(packed.a, or_none(packed.b));
             },
             Release())
        .def("apart",
             [](const Owned& self, const Tensor& stack, int64_t ranks, size_t i, const Tensors& parameters,
                const Flags& trained) { return or_none(self.apart(stack, ranks, i, parameters, trained)); },
             Release());
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    using Release = py::call_guard<py::gil_scoped_release, Plain>;
    using Some = std::vector<Given>;
    using Sizes = std::vector<int64_t>;
    py::class_<Projections>(module, "Projections", py::module_local())
        .def(py::init<Some, std::vector<py::object>, Some, Sizes, Sizes, Tensors, Tensors, std::vector<double>, ScalarType,
                      ScalarType, ScalarType>())
        .def("apply", &Projections::apply)
        .def("pack", &Projections::pack, Release())
        .def("project", &Projections::project, Release())
        .def("derive", &Projections::derive, Release())
        .def("down_gradients", &Projections::down_gradients, Release());
    bind_mixed(module);
}
