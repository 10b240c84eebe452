// A group of LoRA projections forward and backward as one node of torch's autograd, without Python in between.
//
// The same products in the same order as lora/library.py makes through PyTorch, for the plain case: one adapter a
// projection or none, no dropout, no magnitude. Where these are small the host, not the device, decides how long a layer
// takes, and an operation from here costs it a few microseconds, in place of ten and more from Python.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace py = pybind11;
using at::ScalarType;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// Objects that were let go by threads without Python's lock. Such a thread must not wait for it: where the interpreter is
// on its way out, waiting ends the thread in the middle of a destructor, and with it the process.
class LetGo {
public:
    void add(PyObject* object) {
        const std::lock_guard<std::mutex> guard(mutex_);
        objects_.push_back(object);
        if (objects_.size() == 1) Py_AddPendingCall(&LetGo::from_python, this);  // needs no lock; else the next call drops
    }

    void drop() {  // with Python's lock
        std::vector<PyObject*> objects;
        {
            const std::lock_guard<std::mutex> guard(mutex_);
            objects.swap(objects_);
        }
        for (PyObject* object : objects) Py_DECREF(object);
    }

private:
    static int from_python(void* self) {
        static_cast<LetGo*>(self)->drop();
        return 0;
    }

    std::mutex mutex_;
    std::vector<PyObject*> objects_;
};

LetGo& let_go() {
    static auto* const it = new LetGo;  // outlives all threads
    return *it;
}

// A reference to a Python object that any thread may let go.
class Held {
public:
    explicit Held(py::object object)
        : object_(object.release().ptr(), [](PyObject* object) {
              if (Py_IsInitialized() && PyGILState_Check()) {
                  Py_DECREF(object);
              } else {
                  let_go().add(object);
              }
          }) {}

    py::object operator()() const { return py::handle(object_.get())(); }
    bool none() const { return object_.get() == Py_None; }

private:
    std::shared_ptr<PyObject> object_;
};

struct Projection {
    Tensor weight;  // dense, as it is stored; undefined where `decode` gives the values
    Held decode;
    Tensor bias;  // or undefined
    int64_t rank = 0;
    double scaling = 1.0;
    int64_t out_features = 0;

    Tensor values(ScalarType dtype) const {
        if (weight.defined()) return weight.to(dtype);
        py::gil_scoped_acquire gil;
        return decode().cast<Tensor>();
    }
};

struct Group : torch::CustomClassHolder {
    std::vector<Projection> projections;
    ScalarType compute, lora, out;
    int64_t rank = 0;
    Held check{py::none()};  // raises where a frozen weight was changed since forward
    std::vector<bool> trains_a, trains_b;
    bool needs_x = false;

    bool keeps_x() const { return any(trains_a); }
    bool keeps_s() const { return any(trains_b); }
    static bool any(const std::vector<bool>& flags) {
        return std::find(flags.begin(), flags.end(), true) != flags.end();
    }
    bool one_dtype(ScalarType wide) const { return compute == lora && lora == wide; }
};

struct Packed {
    Tensor a;               // (total rank, in_features)
    std::vector<Tensor> b;  // scaled, (out_features, rank); undefined without an adapter
};

// Neither autograd nor autocast, as `in_use` of lora/autograd.py.
struct Plain {
    at::AutoDispatchBelowADInplaceOrView below;
    c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

Packed pack(const Group& group, const std::vector<Tensor>& as, const std::vector<Tensor>& bs) {
    Packed packed;
    if (as.empty()) {
        packed.b.resize(group.projections.size());
        return packed;
    }
    packed.a = (as.size() == 1 ? as[0] : at::cat(as)).to(group.lora);
    std::vector<at::Scalar> factors;
    bool scaled = false;
    for (const auto& projection : group.projections) {
        if (projection.rank == 0) continue;
        factors.emplace_back(projection.scaling);
        scaled = scaled || projection.scaling != 1.0;
    }
    const std::vector<Tensor> ups = scaled ? at::_foreach_mul(bs, factors) : bs;
    size_t next = 0;
    for (const auto& projection : group.projections) {
        packed.b.push_back(projection.rank == 0 ? Tensor() : ups[next++].to(group.lora));
    }
    return packed;
}

// x w^T + s b^T + bias into out: the update first, for the large product to accumulate onto.
void linear(Tensor& out, const Tensor& x, const Tensor& w, const Tensor& bias) {
    if (bias.defined()) {
        at::addmm_out(out, bias, x, w.t());
    } else {
        at::mm_out(out, x, w.t());
    }
}

void project(Tensor& y, const Tensor& inputs, const Projection& projection, const Tensor& s, const Tensor& up,
             const Group& group) {
    const auto compute = group.compute;
    const Tensor w = projection.values(compute);
    const Tensor bias = projection.bias.defined() ? projection.bias.to(compute) : Tensor();
    Tensor base = y.scalar_type() == compute ? y : at::empty(y.sizes(), y.options().dtype(compute));
    if (!up.defined()) {
        linear(base, inputs, w, bias);
    } else if (group.one_dtype(c10::promoteTypes(group.lora, group.out))) {
        linear(base, s, up, bias);
        at::addmm_out(base, base, inputs, w.t());
    } else {
        linear(base, inputs, w, bias);
        if (!base.is_same(y)) {
            const auto wide = c10::promoteTypes(compute, group.lora);
            if (c10::promoteTypes(wide, group.out) == group.out) {
                y.copy_(base);
                base = y;
            } else {
                base = base.to(wide);
            }
        }
        if (s.scalar_type() == base.scalar_type()) {
            at::addmm_out(base, base, s, up.t());
        } else {
            base.add_(at::mm(s, up.t()));
        }
    }
    if (!base.is_same(y)) y.copy_(base);
}

Tensor rows_contiguous(const Tensor& t) {
    return t.stride(-1) == 1 && t.stride(0) >= t.size(1) ? t : t.contiguous();
}

// a b, kept in fp32 where the product of 16-bit operands can be had so and the result is wanted in fp32.
Tensor mm_wide(const Tensor& a, const Tensor& b, ScalarType dtype) {
    if (a.is_cuda() && dtype == at::kFloat && a.element_size() == 2) return at::mm(a, b, at::kFloat);
    return at::mm(a, b);
}

Tensor times(const Tensor& product, double factor, ScalarType dtype) {
    return (factor == 1.0 ? product : at::mul(product, factor)).to(dtype);
}

// dx += dS A, in the wider of the two dtypes.
Tensor add_update(Tensor dx, const Tensor& ds, const Tensor& a) {
    if (!dx.defined()) return at::mm(ds, a);
    dx = dx.to(c10::promoteTypes(dx.scalar_type(), ds.scalar_type()));
    if (dx.scalar_type() == ds.scalar_type()) return at::addmm_out(dx, dx, ds, a);
    return dx.add_(at::mm(ds, a));
}

Tensor input_gradient(const std::vector<Tensor>& dys, Tensor ds, const Group& group, const Packed& packed,
                      ScalarType dx_dtype) {
    const auto wide = c10::promoteTypes(group.compute, dx_dtype);
    Tensor update, dx;
    if (ds.defined() && group.one_dtype(wide)) std::swap(update, ds);
    for (size_t i = 0; i < dys.size(); ++i) {
        if (!dys[i].defined()) continue;
        const Tensor dy = dys[i].to(group.compute);
        const Tensor w = group.projections[i].values(group.compute);
        if (wide == group.compute) {
            if (!dx.defined()) {
                dx = update.defined() ? at::mm(update, packed.a) : at::mm(dy, w);
                if (update.defined()) at::addmm_out(dx, dx, dy, w);
            } else {
                at::addmm_out(dx, dx, dy, w);
            }
        } else {
            const Tensor part = at::mm(dy, w);
            dx = dx.defined() ? dx.add_(part) : part.to(wide);
        }
    }
    return ds.defined() ? add_update(dx, ds, packed.a) : dx;
}

// Gradients of x, and of each adapter's a and b.
variable_list derive(const variable_list& given, const std::vector<int64_t>& shape, ScalarType x_dtype, const Tensor& x,
                     const Tensor& s, const std::vector<Tensor>& as, const std::vector<Tensor>& bs, const Group& group) {
    const auto count = group.projections.size();
    variable_list results(1 + 2 * as.size());
    std::vector<Tensor> dys(count);
    int64_t tokens = 0;
    bool all = true, some = false;
    for (size_t i = 0; i < count; ++i) {
        if (given[i].defined()) {
            dys[i] = rows_contiguous(given[i].reshape({-1, given[i].size(-1)}));
            tokens = dys[i].size(0);
        }
        all = all && given[i].defined();
        some = some || given[i].defined();
    }
    if (!some) return results;
    const Packed packed = pack(group, as, bs);
    Tensor ds;
    if (packed.a.defined()) {
        const auto options = packed.a.options();
        ds = all ? at::empty({tokens, group.rank}, options) : at::zeros({tokens, group.rank}, options);
    }
    int64_t column = 0;
    size_t adapter = 0;
    for (size_t i = 0; i < count; ++i) {
        const auto& projection = group.projections[i];
        if (projection.rank == 0) continue;
        const auto at = adapter++;
        const auto first = std::exchange(column, column + projection.rank);
        if (!dys[i].defined()) continue;
        const Tensor dy = dys[i].to(group.lora);
        Tensor own = ds.narrow(1, first, projection.rank);
        at::mm_out(own, dy, packed.b[i]);
        if (group.trains_b[at]) {
            const auto dtype = bs[at].scalar_type();
            const Tensor db = mm_wide(dy.t(), s.narrow(1, first, projection.rank), dtype);
            results[2 + 2 * at] = times(db, projection.scaling, dtype);
        }
    }
    if (group.needs_x) {
        const Tensor dx = input_gradient(dys, ds, group, packed, x_dtype);
        if (dx.defined()) results[0] = dx.view(shape).to(x_dtype);
    }
    if (ds.defined() && group.keeps_x()) {
        const Tensor rows = x.reshape({-1, x.size(-1)}).to(group.lora);
        const Tensor joint = mm_wide(ds.t(), rows, as[0].scalar_type());
        column = 0;
        adapter = 0;
        for (size_t i = 0; i < count; ++i) {
            const auto rank = group.projections[i].rank;
            if (rank == 0) continue;
            const auto at = adapter++;
            const auto first = std::exchange(column, column + rank);
            if (group.trains_a[at] && dys[i].defined()) {
                results[1 + 2 * at] = joint.narrow(0, first, rank).to(as[at].scalar_type());
            }
        }
    }
    return results;
}

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

std::vector<Tensor> every_other(at::TensorList tensors, size_t first) {
    std::vector<Tensor> found;
    for (size_t i = first; i < tensors.size(); i += 2) found.push_back(tensors[i]);
    return found;
}

struct LoraGroup : public torch::autograd::Function<LoraGroup> {
    // adapters: a and b of each in turn, in the order in which lora/autograd.py saves them.
    static variable_list forward(AutogradContext* ctx, const Tensor& x, at::TensorList adapters,
                                 const c10::intrusive_ptr<Group>& group) {
        const auto as = every_other(adapters, 0), bs = every_other(adapters, 1);
        std::vector<Tensor> outputs;
        Tensor kept, s;
        {
            Plain plain;
            const auto size = static_cast<int64_t>(c10::elementSize(group->compute));
            const bool once = group->compute == group->lora && x.element_size() >= size;
            kept = once ? x.to(group->compute) : x;
            const Tensor rows = kept.reshape({-1, kept.size(-1)});
            const Tensor inputs = rows.to(group->compute);
            const Packed packed = pack(*group, as, bs);
            if (packed.a.defined()) s = at::mm(rows.to(group->lora), packed.a.t());
            int64_t column = 0;
            auto sizes = x.sizes().vec();
            for (size_t i = 0; i < group->projections.size(); ++i) {
                const auto& projection = group->projections[i];
                sizes.back() = projection.out_features;
                outputs.push_back(at::empty(sizes, x.options().dtype(group->out)));
                Tensor y = outputs.back().view({-1, projection.out_features});
                const auto first = std::exchange(column, column + projection.rank);
                const Tensor own = projection.rank ? s.narrow(1, first, projection.rank) : Tensor();
                project(y, inputs, projection, own, packed.b[i], *group);
            }
        }
        ctx->set_materialize_grads(false);
        ctx->saved_data["group"] = c10::IValue::make_capsule(group);
        ctx->saved_data["shape"] = x.sizes().vec();
        ctx->saved_data["dtype"] = static_cast<int64_t>(x.scalar_type());
        variable_list saved{group->keeps_x() ? kept : Tensor(), group->keeps_s() ? s : Tensor()};
        saved.insert(saved.end(), adapters.begin(), adapters.end());
        ctx->save_for_backward(std::move(saved));
        return outputs;
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& given) {
        const auto group = c10::static_intrusive_pointer_cast<Group>(ctx->saved_data["group"].toCapsule());
        const auto saved = ctx->get_saved_variables();
        {
            py::gil_scoped_acquire gil;
            group->check();
        }
        const auto as = every_other(saved, 2), bs = every_other(saved, 3);
        const bool differentiable = at::GradMode::is_enabled();
        variable_list results;
        {
            Plain plain;
            at::NoGradGuard no_grad;
            results = derive(given, ctx->saved_data["shape"].toIntVector(),
                             static_cast<ScalarType>(ctx->saved_data["dtype"].toInt()), saved[0], saved[1], as, bs, *group);
        }
        if (differentiable) results = once_differentiable(std::move(results));
        results.emplace_back();  // the group
        return results;
    }
};

// The arguments' dtypes and sizes are checked in Python.
std::vector<Tensor> apply(const Tensor& x, const std::vector<std::optional<Tensor>>& weights,
                          const std::vector<py::object>& decoders, const std::vector<std::optional<Tensor>>& biases,
                          const std::vector<int64_t>& out_features, const std::vector<std::optional<Tensor>>& given_a,
                          const std::vector<std::optional<Tensor>>& given_b, const std::vector<double>& scalings,
                          ScalarType compute, ScalarType lora, ScalarType out, py::object check) {
    let_go().drop();
    auto group = c10::make_intrusive<Group>();
    group->compute = compute;
    group->lora = lora;
    group->out = out;
    group->check = Held(std::move(check));
    group->needs_x = x.requires_grad();
    std::vector<Tensor> adapters;
    for (size_t i = 0; i < weights.size(); ++i) {
        Projection projection{weights[i] ? weights[i]->detach() : Tensor(), Held(decoders[i]),
                              biases[i] ? biases[i]->detach() : Tensor(), 0, scalings[i], out_features[i]};
        if (given_a[i]) {
            projection.rank = given_a[i]->size(0);
            group->rank += projection.rank;
            adapters.push_back(*given_a[i]);
            adapters.push_back(*given_b[i]);
            group->trains_a.push_back(given_a[i]->requires_grad());
            group->trains_b.push_back(given_b[i]->requires_grad());
        }
        group->projections.push_back(std::move(projection));
    }
    py::gil_scoped_release release;
    return LoraGroup::apply(x, at::TensorList(adapters), group);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) { module.def("apply", &apply); }
