// Python objects in C++ that any thread may let go.
#pragma once
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

namespace py = pybind11;

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

    template <typename Result, typename... Args>
    Result call(Args&&... args) const {
        py::gil_scoped_acquire gil;
        const py::object found = py::handle(object_.get())(std::forward<Args>(args)...);
        if constexpr (!std::is_void_v<Result>) return found.template cast<Result>();
    }
    bool none() const { return object_.get() == Py_None; }

private:
    std::shared_ptr<PyObject> object_;
};

}  // namespace
